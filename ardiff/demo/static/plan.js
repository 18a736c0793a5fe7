/* Plans and how they are drawn: the mirror of ardiff.schedulers.ad_schedule, the profiles, and the planned noise map.
 *
 * A gap is a whole number, or one per new frame after the first. Noise levels run from 1 (pure noise, dark) to 0 (clean,
 * light). Rows are model calls, columns are frames. Nothing here asks the server for anything.
 */
(() => {
"use strict";

const api = window.ardiffStudio = window.ardiffStudio || {};

/* ---- The plan: a mirror of ardiff.schedulers.ad_schedule -------------------------------------------------------- */

/* `offsets[i]`: the calls that new frame i waits before its first step. */
function makePlan(frames, steps, gap, prompts) {
  const fresh = frames - prompts, gaps = Array.isArray(gap) ? gap : Array(Math.max(fresh - 1, 0)).fill(gap);
  const offsets = [0];
  for (const each of gaps) offsets.push(offsets[offsets.length - 1] + each);
  return { frames, steps, gap, prompts, fresh, gaps, offsets, calls: steps + offsets[offsets.length - 1] };
}

/* Step index of a frame after model call `row` (1-based): 0 = noise, steps = clean. */
function stepIndex(plan, row, frame) {
  if (frame < plan.prompts) return plan.steps;
  return Math.min(Math.max(row - plan.offsets[frame - plan.prompts], 0), plan.steps);
}

function smallestGap(window, steps) {
  return Math.ceil(steps / window);
}

function planCounts(plan) {
  const last = plan.offsets[plan.offsets.length - 1];
  const commits = plan.offsets.filter((offset) => offset < last).length;
  // In the call in which a frame takes its first step: it, and the earlier ones that still have steps to take.
  const inFlight = plan.offsets.map((start) =>
    plan.offsets.filter((offset) => offset <= start && offset > start - plan.steps).length);
  return {
    iterations: plan.calls,
    frameEvaluations: plan.fresh * plan.steps + commits + plan.prompts,
    commits,
    firstFrameIteration: plan.steps,
    maxInFlight: Math.max(...inFlight),
  };
}

/* Bytes beside the weights, about: the mirror of LoadedModel.run_memory. */
function runMemory(plan, guided, model) {
  const same = (offset) => plan.offsets.filter((other) => other === offset).length;
  const together = Math.max(...plan.offsets.map(same));
  // Prompt frames are evaluated once, beside the frames that take the first step of all.
  const evaluated = Math.max(planCounts(plan).maxInFlight, plan.prompts + same(0));
  const { packed, cache, frame, decoded } = model.memory;
  const twice = guided ? 2 : 1;
  return packed + cache * twice + Math.max(
    frame * (model.whole_window ? model.window : evaluated) * twice, decoded * Math.max(together, plan.prompts));
}

function memoryWords(bytes) {
  const mega = bytes / 2 ** 20;
  return "about " + (mega < 1000 ? Math.max(1, Math.round(mega)) + " MB" : (mega / 1024).toFixed(1) + " GB") + " of memory";
}

/* Gaps of a profile: the mirror of profile_gaps there. */
function profileGaps(profile, gap, chunk, fresh, steps) {
  const count = Math.max(fresh - 1, 0);
  if (profile === "chunks") return Array.from({ length: count }, (_, i) => ((i + 1) % chunk ? 0 : steps));
  if (profile === "ramp") {
    return Array.from({ length: count }, (_, i) =>
      (count > 1 ? Math.floor((2 * gap * i + count - 1) / (2 * (count - 1))) : gap));
  }
  return gap;
}

const LONG_SECONDS = 300;

function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return "about " + Math.round(seconds) + " s";
  return "about " + Math.round(seconds / 60) + " min";
}

/* Why the model cannot run a plan, in a sentence; "" when it can. */
function planProblem(plan, model) {
  if (plan.fresh < 1) return "The length must be larger than the " + plan.prompts + " prompt frames.";
  if (plan.frames < model.shortest) return "With this model a video has at least " + model.shortest + " frames.";
  const most = planCounts(plan).maxInFlight, window = model.window;
  if (most <= window) return "";
  return "This puts " + most + " frames in flight and the model sees " + window + ": " + (Array.isArray(plan.gap)
    ? "larger gaps are needed." : "choose a gap of at least " + smallestGap(window, plan.steps) + ".");
}

/* The plan in one sentence; `ok` is false when the model cannot run it. */
function planSentence(plan, guided, model) {
  const problem = planProblem(plan, model);
  if (problem) return { ok: false, text: problem };
  const counts = planCounts(plan);
  const evaluations = model.whole_window ? counts.iterations * model.window : counts.frameEvaluations;
  const seconds = counts.iterations * model.call + evaluations * model.frame * (guided ? 2 : 1);
  const flight = counts.maxInFlight === 1 ? "one frame in flight" : "at most " + counts.maxInFlight + " frames in flight";
  return {
    ok: true,
    text: counts.iterations + " model calls, first new frame after call " + counts.firstFrameIteration + ", " + flight +
      (model.memory ? ", " + memoryWords(runMemory(plan, guided, model)) : "") +
      (!model.measured ? "; how long is not measured yet."
        : ", " + duration(seconds) + (seconds > LONG_SECONDS ? " on this device: fewer steps or frames take less." : ".")),
  };
}

/* What the timestep gap means for this plan. */
function gapMeaning(plan) {
  if (Array.isArray(plan.gap)) {
    const low = Math.min(...plan.gap), high = Math.max(...plan.gap);
    return "Gaps from " + low + " to " + high + ": the larger a gap, the later the next frame starts.";
  }
  if (plan.gap === 0) return "Gap 0: all frames clear up at the same time.";
  if (plan.gap === plan.steps) return "Gap " + plan.gap + ": a frame starts when the frame before it is clean.";
  const steps = plan.gap === 1 ? "one step" : plan.gap + " steps";
  return "Gap " + plan.gap + ": each frame is " + steps + " ahead of the next one, so " + planCounts(plan).maxInFlight +
    " clear up at once.";
}

/* ---- Colours and small drawing helpers -------------------------------------------------------------------------- */

/* Noise to clean, lightness strictly rising, blue to yellow: readable without colour and with any colour vision. */
const NOISE_COLOURS = [[22, 32, 66], [58, 72, 116], [121, 126, 143], [199, 187, 152], [243, 233, 205]];

function noiseColour(level) {
  const place = (1 - level) * (NOISE_COLOURS.length - 1);
  const low = Math.min(Math.floor(place), NOISE_COLOURS.length - 2);
  return NOISE_COLOURS[low].map((c, i) => Math.round(c + (NOISE_COLOURS[low + 1][i] - c) * (place - low)));
}

/* A canvas sized to device pixels; gives its 2-D context scaled to CSS pixels. */
function context(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const w = Math.max(1, Math.round(width * ratio)), h = Math.max(1, Math.round(height * ratio));
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

let grain = null;
function grainPicture() {
  if (grain) return grain;
  grain = document.createElement("canvas");
  grain.width = grain.height = 224;
  const pen = grain.getContext("2d"), data = pen.createImageData(224, 224);
  let seed = 7;
  const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
  for (let i = 0; i < data.data.length; i += 4) {
    const light = (random() + random() + random()) / 3;
    for (let c = 0; c < 3; c++) data.data[i + c] = 255 * (0.72 * light + 0.28 * random()) * [0.86, 0.93, 1.06][c];
    data.data[i + 3] = 255;
  }
  pen.putImageData(data, 0, 0);
  return grain;
}

/* A frame's picture under as much grain as it has noise left; the grain itself when there is no picture yet. */
function drawFrame(pen, picture, level, frame, side) {
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  if (picture) pen.drawImage(picture, 0, 0, side, side);
  const cover = picture ? Math.pow(level, 0.8) : 1;
  if (cover > 0.004) {
    const shift = (frame * 37) % 96;
    pen.globalAlpha = cover;
    pen.imageSmoothingEnabled = false;
    const size = Math.min(side, 128);
    pen.drawImage(grainPicture(), shift, (shift * 5) % 96, size, size, 0, 0, side, side);
    pen.globalAlpha = 1;
  }
}

/* The noise map: one column per frame at `left(frame)`, `width` wide; rows after `now` are still to come and paler. */
function drawMap(canvas, plan, box) {
  const pen = context(canvas, box.width, box.height);
  const cells = document.createElement("canvas");
  cells.width = plan.frames;
  cells.height = plan.calls;
  const cellPen = cells.getContext("2d"), image = cellPen.createImageData(plan.frames, plan.calls);
  const colours = Array.from({ length: plan.steps + 1 }, (_, k) => noiseColour(1 - k / plan.steps));
  for (let row = 1, at = 0; row <= plan.calls; row++) {
    for (let frame = 0; frame < plan.frames; frame++, at += 4) {
      const colour = colours[stepIndex(plan, row, frame)];
      image.data.set([colour[0], colour[1], colour[2], 255], at);
    }
  }
  cellPen.putImageData(image, 0, 0);
  const nowY = box.now == null ? box.height : box.height * Math.min(1, box.now / plan.calls);
  pen.imageSmoothingEnabled = false;
  for (let frame = 0; frame < plan.frames; frame++) {
    const x = box.left(frame), radius = Math.min(5, box.column / 4);
    pen.save();
    pen.beginPath();
    pen.roundRect(x, 0, box.column, box.height, radius);
    pen.clip();
    pen.drawImage(cells, frame, 0, 1, plan.calls, x, 0, box.column, box.height);
    if (frame < plan.prompts) hatch(pen, x, box.column, box.height);
    if (nowY < box.height) {
      pen.fillStyle = box.veil;
      pen.fillRect(x, nowY, box.column, box.height - nowY);
    }
    pen.restore();
  }
  if (box.window && box.now != null) drawWindow(pen, plan, box);
  if (box.now != null && box.now < plan.calls) drawNow(pen, nowY, box);
}

/* The frames that the latest started frame can see, as an outlined box: it slides when a video outgrows the window. */
function drawWindow(pen, plan, box) {
  if (plan.frames <= box.window) return;
  const started = plan.offsets.filter((offset) => offset < Math.max(box.now, 1)).length + plan.prompts;
  const first = Math.max(0, started - box.window), x = box.left(first);
  pen.strokeStyle = box.accent;
  pen.lineWidth = 2;
  pen.strokeRect(x + 1, 1, box.left(started - 1) + box.column - x - 2, box.height - 2);
}

function hatch(pen, x, width, height) {
  pen.strokeStyle = "rgba(22, 32, 66, 0.28)";
  pen.lineWidth = 1;
  pen.beginPath();
  for (let y = -width; y < height; y += 7) { pen.moveTo(x, y + width); pen.lineTo(x + width, y); }
  pen.stroke();
}

function drawNow(pen, y, box) {
  for (const [width, colour] of [[5, "rgba(0, 0, 0, 0.55)"], [3.4, "#fff"], [1.8, box.accent]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(0, y);
    pen.lineTo(box.width, y);
    pen.stroke();
  }
}

function themeColour(element, name) {
  return getComputedStyle(element).getPropertyValue(name).trim() || "#888";
}

/* Draws in the next frame: drawing may change sizes, and one that changes within an observer's round is reported as an error. */
function redrawOnResize(element, draw) {
  new ResizeObserver(() => requestAnimationFrame(() => draw())).observe(element);
}

/* ---- The map as a picture for a paper --------------------------------------------------------------------------- */

/* The plan as a small SVG on white: frames to the right, model calls down; the levels of a frame are one gradient. */
function mapSvg(plan) {
  const column = 18, space = 3, top = 46, left = 52, height = Math.max(160, Math.min(420, plan.calls * 3));
  const width = plan.frames * (column + space) - space, scale = height / plan.calls, colour = (level) =>
    "rgb(" + noiseColour(level).join(",") + ")";
  const stops = Array.from({ length: 11 }, (_, i) =>
    `<stop offset="${i / 10}" stop-color="${colour(1 - i / 10)}"/>`).join("");
  const rect = (x, from, to, fill) => (to > from
    ? `<rect x="${x}" y="${(top + from * scale).toFixed(2)}" width="${column}" height="${((to - from) * scale).toFixed(2)}" fill="${fill}"/>`
    : "");
  let body = "";
  for (let frame = 0; frame < plan.frames; frame++) {
    const x = left + frame * (column + space), prompt = frame < plan.prompts;
    const start = prompt ? 0 : plan.offsets[frame - plan.prompts], end = prompt ? 0 : start + plan.steps;
    body += rect(x, 0, start, colour(1)) + rect(x, start, end, "url(#levels)") +
      rect(x, end, plan.calls, prompt ? "url(#prompt)" : colour(0));
    if (plan.frames <= 24 || (frame + 1) % 4 === 0) {
      body += `<text x="${x + column / 2}" y="${top - 7}" text-anchor="middle">${prompt ? "P" : ""}${frame + 1}</text>`;
    }
  }
  const gap = Array.isArray(plan.gap) ? "gaps " + plan.gap.join(", ") : "timestep gap " + plan.gap;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${left + width + 90} ${top + height + 22}" ` +
    `width="${left + width + 90}" height="${top + height + 22}" font-family="sans-serif" font-size="11">` +
    `<title>Noise map: ${plan.frames} frames, ${plan.steps} steps, ${gap}</title>` +
    `<defs><linearGradient id="levels" x2="0" y2="1">${stops}</linearGradient>` +
    `<linearGradient id="scale" y1="1" x2="0" y2="0">${stops}</linearGradient>` +
    `<pattern id="prompt" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">` +
    `<rect width="6" height="6" fill="${colour(0)}"/><rect width="2" height="6" fill="#8a8676"/></pattern></defs>` +
    `<rect width="100%" height="100%" fill="#fff"/><g fill="#222">${body}` +
    `<text x="${left}" y="18" font-size="12">frame</text>` +
    `<text x="${left - 8}" y="${top + 9}" text-anchor="end">call 1</text>` +
    `<text x="${left - 8}" y="${top + height}" text-anchor="end">${plan.calls}</text>` +
    `<rect x="${left + width + 20}" y="${top}" width="10" height="90" fill="url(#scale)"/>` +
    `<text x="${left + width + 36}" y="${top + 9}">clean</text><text x="${left + width + 36}" y="${top + 90}">noise</text>` +
    "</g></svg>";
}

/* The same as a PNG, twice the size. */
async function mapPng(plan) {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(mapSvg(plan));
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * image.width;
  canvas.height = 2 * image.height;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/* ---- The controls and the planned map under them ---------------------------------------------------------------- */

const studio = api.studio = {
  model: { window: 16, call: 0, frame: 0, measured: false }, planView: null, stage: null, controls: null, drawn: null, ahead: 0, later: 0, echoes: new Set(),
  asked: {}, promptWords: [],
};

/* Called by the page whenever a control moves; nothing is sent to the server. */
function setControls(frames, gap, steps, guidance, prompts, guided, profile, chunk) {
  const whole = (value, fallback) => (Number.isFinite(+value) && value !== null ? Math.round(+value) : fallback);
  const n = Math.max(1, whole(steps, 50)), before = studio.controls;
  // What was just drawn is ahead of the page's fields, which take a moment to follow: until then they wait.
  const wait = studio.ahead - performance.now(), given = arguments;
  clearTimeout(studio.later);
  if (wait > 0) {
    studio.later = setTimeout(() => setControls(...given), wait);
    return;
  }
  const c = {
    frames: Math.max(1, whole(frames, 16)), steps: n, gap: Math.min(Math.max(whole(gap, 5), 0), n),
    guidance: +guidance, prompts: whole(prompts, 0), guided, profile: profile || "even", chunk: Math.max(1, whole(chunk, 4)),
  };
  const count = Math.max(c.frames - c.prompts - 1, 0);
  if (c.profile === "drawn") {
    // A drawing starts from the plan that was there, and goes on with its last gap when the video gets longer.
    const from = studio.drawn || (before ? [].concat(makePlan(before.frames, n, before.gaps, before.prompts).gaps) : []);
    c.gaps = Array.from({ length: count }, (_, i) => Math.min(from[i] ?? from[from.length - 1] ?? c.gap, n));
    publish(c.gaps);
  } else c.gaps = profileGaps(c.profile, c.gap, c.chunk, c.frames - c.prompts, n);
  studio.controls = c;
  if (studio.planView) studio.planView();
  document.dispatchEvent(new CustomEvent("ardiff:controls"));
}

/* The page's field of drawn gaps changed: from outside (settings, a link), or as the echo of what was drawn here. */
function setDrawn(text) {
  if (studio.echoes.has(text)) {
    if (text === JSON.stringify(studio.drawn)) studio.echoes.clear();
    return;
  }
  if (text) studio.drawn = JSON.parse(text);
}

/* Tell the page which gaps were drawn: its hidden field holds what a run is asked with. */
function publish(gaps) {
  const text = JSON.stringify(gaps);
  if (text === JSON.stringify(studio.drawn)) return;
  studio.drawn = gaps;
  studio.echoes.add(text);
  if (api.setField) api.setField("ar-drawn", text);
}

class PlanView {
  constructor(element, props, watch) {
    this.root = element;
    this.canvas = element.querySelector("canvas");
    this.sentence = element.querySelector(".ar-sentence");
    this.props = props;
    this.chosen = 1;
    this.refusal = "";
    this.drag = null;
    studio.planView = () => { this.refusal = ""; this.draw(); };
    watch("value", () => this.learn());
    redrawOnResize(this.canvas, () => this.draw());
    this.canvas.addEventListener("pointerdown", (event) => this.grab(event));
    this.canvas.addEventListener("pointermove", (event) => this.pull(event));
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { this.drag = null; });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.draw());
    this.canvas.addEventListener("blur", () => this.draw());
    this.learn();
  }

  learn() {
    if (!this.props.value) return;
    studio.model = this.props.value.model;
    this.draw();
  }

  get plan() {
    const c = studio.controls;
    return makePlan(c.frames, c.steps, c.gaps, c.prompts);
  }

  draw() {
    const c = studio.controls;
    if (!c || !this.root.isConnected) return;
    const plan = this.plan, told = planSentence(plan, (c.guided || studio.model.always_guided) && c.guidance > 1, studio.model);
    this.sentence.textContent = this.refusal || told.text;
    this.root.querySelector(".ar-plan").classList.toggle("ar-bad", !told.ok || Boolean(this.refusal));
    this.root.querySelector(".ar-high").textContent = c.steps + ": one after another";
    document.querySelectorAll(".ar-presets button").forEach((button, index) => {
      const gap = this.props.value.presets[index] ?? c.steps;
      button.setAttribute("aria-pressed", String(c.profile === "even" && gap === c.gap));
    });
    if (plan.fresh < 1) return;
    const width = this.canvas.clientWidth, space = plan.frames > 32 ? 1 : 2;
    const column = (width - space * (plan.frames - 1)) / plan.frames;
    this.step = column + space;
    this.chosen = Math.min(Math.max(this.chosen, 1), Math.max(plan.fresh - 1, 1));
    drawMap(this.canvas, plan, {
      width, height: this.canvas.clientHeight, column, left: (frame) => frame * this.step, now: null,
    });
    if (document.activeElement === this.canvas && plan.fresh > 1) this.mark(plan, column);
    this.canvas.setAttribute("aria-label", "Planned noise map, " + plan.frames + " frames: " + told.text +
      " Left and right choose a frame, up and down change the gap before it.");
    this.canvas.setAttribute("aria-valuemax", String(plan.steps));
    this.canvas.setAttribute("aria-valuenow", String(plan.gaps[this.chosen - 1] ?? 0));
    this.canvas.setAttribute("aria-valuetext", "Gap before frame " + (plan.prompts + this.chosen + 1) + ": " +
      (plan.gaps[this.chosen - 1] ?? 0));
    if (studio.stage) studio.stage.replan(plan);
  }

  mark(plan, column) {
    const pen = this.canvas.getContext("2d"), y = this.canvas.clientHeight * plan.offsets[this.chosen] / plan.calls;
    pen.strokeStyle = themeColour(this.root, "--ar-accent-line");
    pen.lineWidth = 2;
    pen.strokeRect((plan.prompts + this.chosen) * this.step + 1, y + 1, column - 2, this.canvas.clientHeight * plan.steps / plan.calls - 2);
  }

  /* Give a new frame another gap to its left neighbour; what breaks a rule is not done, and the sentence says why. */
  change(index, gap) {
    const c = studio.controls, gaps = [...this.plan.gaps];
    if (index < 1 || index > gaps.length || gaps[index - 1] === gap) return;
    this.refusal = "";
    if (gap < 0) this.refusal = "A frame cannot be ahead of the frame before it: the smallest gap is 0.";
    else if (gap > c.steps) this.refusal = "The largest gap is the number of steps, " + c.steps + ": the frame before is clean by then.";
    else {
      gaps[index - 1] = gap;
      this.refusal = planProblem(makePlan(c.frames, c.steps, gaps, c.prompts), studio.model);
    }
    const refusal = this.refusal;
    if (!refusal) {
      publish(gaps);
      studio.ahead = performance.now() + 400;
      Object.assign(c, { profile: "drawn", gaps });
      document.dispatchEvent(new CustomEvent("ardiff:controls"));
    }
    this.draw();
  }

  grab(event) {
    if (!studio.controls) return;
    const plan = this.plan, index = Math.floor(event.offsetX / this.step) - plan.prompts;
    if (index < 1 || index >= plan.fresh) return;
    this.chosen = index;
    // The scale of the moment when it was grabbed: the map grows and shrinks under the pointer otherwise.
    this.drag = { index, y: event.offsetY, gap: plan.gaps[index - 1], calls: plan.calls / this.canvas.clientHeight };
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.focus({ preventScroll: true });
  }

  pull(event) {
    if (!this.drag) return;
    this.change(this.drag.index, Math.round(this.drag.gap + (event.offsetY - this.drag.y) * this.drag.calls));
  }

  key(event) {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const more = { ArrowUp: -1, ArrowDown: 1, PageUp: -5, PageDown: 5 }[event.key];
    if (!turn && !more) return;
    event.preventDefault();
    const plan = this.plan;
    if (turn) {
      this.chosen = Math.min(Math.max(this.chosen + turn, 1), Math.max(plan.fresh - 1, 1));
      this.draw();
    } else this.change(this.chosen, plan.gaps[this.chosen - 1] + more);
  }
}

function mountPlan(element, props, watch) {
  new PlanView(element, props, watch);
}

Object.assign(api, {
  makePlan, stepIndex, smallestGap, planCounts, profileGaps, planProblem, runMemory, planSentence, gapMeaning, noiseColour, context,
  drawFrame, drawMap, themeColour, redrawOnResize, mapSvg, mapPng, setControls, setDrawn, mountPlan,
});
})();
