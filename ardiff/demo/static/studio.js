/* The studio in the browser: the planned noise map, the film strip that clears up, the player and the live noise map.
 *
 * Everything is drawn from two values: the controls (plan, no request) and the run's JSON that the server sends.
 * Noise levels run from 1 (pure noise, dark) to 0 (clean, light). Rows are model calls, columns are frames.
 */
(() => {
"use strict";

/* ---- The plan: a mirror of ardiff.schedulers.ad_schedule for one whole-number gap ------------------------------- */

function makePlan(frames, steps, gap, prompts) {
  const fresh = frames - prompts;
  return { frames, steps, gap, prompts, fresh, calls: steps + gap * (fresh - 1) };
}

/* Step index of a frame after model call `row` (1-based): 0 = noise, steps = clean. */
function stepIndex(plan, row, frame) {
  if (frame < plan.prompts) return plan.steps;
  return Math.min(Math.max(row - plan.gap * (frame - plan.prompts), 0), plan.steps);
}

function smallestGap(window, steps) {
  return Math.ceil(steps / window);
}

function planCounts(plan) {
  const commits = plan.gap > 0 ? plan.fresh - 1 : 0;
  return {
    iterations: plan.calls,
    frameEvaluations: plan.fresh * plan.steps + commits + plan.prompts,
    commits,
    firstFrameIteration: plan.steps,
    maxInFlight: plan.gap === 0 ? plan.fresh : Math.min(plan.fresh, Math.ceil(plan.steps / plan.gap)),
  };
}

function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return "about " + Math.round(seconds) + " s";
  return "about " + Math.round(seconds / 60) + " min";
}

/* The plan in one sentence; `ok` is false when the model cannot run it. */
function planSentence(plan, guided, model) {
  if (plan.fresh < 1) {
    return { ok: false, text: "The length must be larger than the " + plan.prompts + " prompt frames." };
  }
  const counts = planCounts(plan);
  if (counts.maxInFlight > model.window) {
    return {
      ok: false,
      text: "This puts " + counts.maxInFlight + " frames in flight and the model sees " + model.window +
        ": choose a gap of at least " + smallestGap(model.window, plan.steps) + ".",
    };
  }
  const seconds = counts.iterations * model.call +
    counts.frameEvaluations * model.frame * (guided ? 2 : 1);
  const flight = counts.maxInFlight === 1 ? "one frame in flight" : "at most " + counts.maxInFlight + " frames in flight";
  return {
    ok: true,
    text: counts.iterations + " model calls, first new frame after call " + counts.firstFrameIteration + ", " + flight +
      ", " + duration(seconds) + ".",
  };
}

/* What the timestep gap means for this plan. */
function gapMeaning(plan) {
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
  if (box.now != null && box.now < plan.calls) drawNow(pen, nowY, box);
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

/* ---- The planned map under the gap control ---------------------------------------------------------------------- */

const studio = { model: { window: 16, call: 0.02, frame: 0.004 }, planView: null, stage: null, controls: null };

function mountPlan(element, props, watch) {
  const canvas = element.querySelector("canvas"), sentence = element.querySelector(".ar-sentence");
  const high = element.querySelector(".ar-high");
  const draw = () => {
    const c = studio.controls;
    if (!c || !element.isConnected) return;
    const plan = makePlan(c.frames, c.steps, c.gap, c.prompts);
    const told = planSentence(plan, c.guided && c.guidance > 1, studio.model);
    sentence.textContent = told.text;
    element.querySelector(".ar-plan").classList.toggle("ar-bad", !told.ok);
    high.textContent = c.steps + ": one after another";
    document.querySelectorAll(".ar-presets button").forEach((button, index) => {
      button.setAttribute("aria-pressed", String((props.value.presets[index] ?? c.steps) === c.gap));
    });
    if (plan.fresh < 1) return;
    const width = canvas.clientWidth, space = plan.frames > 32 ? 1 : 2;
    const column = (width - space * (plan.frames - 1)) / plan.frames;
    drawMap(canvas, plan, {
      width, height: canvas.clientHeight, column, left: (frame) => frame * (column + space), now: null,
    });
    canvas.setAttribute("aria-label", "Planned noise map, " + plan.frames + " frames, timestep gap " + plan.gap + ": " +
      told.text);
    if (studio.stage) studio.stage.replan(plan);
  };
  studio.planView = draw;
  const learn = () => {
    if (!props.value) return;
    studio.model = props.value.model;
    if (!studio.controls) studio.controls = props.value.controls;
    draw();
  };
  watch("value", learn);
  new ResizeObserver(draw).observe(canvas);
  learn();
}

/* Called by the page whenever a schedule control moves; nothing is sent to the server. */
function setControls(frames, gap, steps, guidance, prompts, guided) {
  const whole = (value, fallback) => (Number.isFinite(+value) && value !== null ? Math.round(+value) : fallback);
  const n = Math.max(1, whole(steps, 50));
  studio.controls = {
    frames: Math.max(1, whole(frames, 16)), steps: n, gap: Math.min(Math.max(whole(gap, 5), 0), n),
    guidance: +guidance, prompts: whole(prompts, 0), guided,
  };
  if (studio.planView) studio.planView();
}

/* ---- The stage: player, progress, film strip, live map ---------------------------------------------------------- */

class Stage {
  constructor(element, props, watch) {
    this.root = element;
    this.find = (selector) => element.querySelector(selector);
    this.strip = this.find(".ar-strip");
    this.map = this.find(".ar-map");
    this.run = null;
    this.value = null;
    this.plan = null;
    this.pictures = [];
    this.shown = [];
    this.asked = [];
    this.quiet = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.playing = !this.quiet;
    this.position = 0;
    this.touched = 0;
    this.find(".ar-play").addEventListener("click", () => this.setPlaying(!this.playing));
    this.find(".ar-seek").addEventListener("input", (event) => this.seek(+event.target.value));
    this.find(".ar-scroll").addEventListener("pointerdown", () => { this.touched = performance.now(); });
    this.find(".ar-scroll").addEventListener("wheel", () => { this.touched = performance.now(); }, { passive: true });
    this.strip.addEventListener("keydown", (event) => this.moveFocus(event));
    this.setPlaying(this.playing);
    watch("value", () => this.receive(props.value));
    new ResizeObserver(() => this.draw()).observe(this.find(".ar-scroll"));
    new MutationObserver(() => this.draw()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    this.receive(props.value);
    requestAnimationFrame((now) => this.play(now));
  }

  get running() { return this.value && ["queued", "running"].includes(this.value.phase); }

  /* A new plan of the controls: shown at once unless a run, or its result, is on the stage. */
  replan(plan) {
    if (this.value && this.value.run) return;
    this.plan = plan;
    this.draw();
  }

  receive(value) {
    if (!value) return;
    // Words alone (a wrong input): the last result stays on the stage.
    if (!value.run && this.run) value = { ...this.value, phase: value.phase, title: value.title, message: value.message };
    if (value.run !== this.run) {
      this.pictures.forEach((picture) => picture && picture.close && picture.close());
      this.run = value.run;
      this.pictures = [];
      this.shown = [];
      this.asked = [];
      this.position = 0;
    }
    this.value = value;
    if (value.model) { studio.model = value.model; }
    if (value.run) this.plan = makePlan(value.frames, value.steps, value.gap, value.prompts);
    document.documentElement.dataset.ardiffPhase = value.phase;
    (value.pics || []).forEach((picture, frame) => this.decode(picture, frame));
    this.draw();
  }

  /* Decode in the background and keep the old picture until the new one is there: a tile never goes blank. */
  async decode(source, frame) {
    const version = this.value.rev[frame], run = this.run;
    if (!source || this.asked[frame] === version) return;
    this.asked[frame] = version;
    const [head, body] = source.split(",");
    const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
    const picture = await createImageBitmap(new Blob([bytes], { type: head.slice(5, head.indexOf(";")) }));
    if (this.run !== run || this.shown[frame] > version) { picture.close(); return; }
    if (this.pictures[frame]) this.pictures[frame].close();
    this.pictures[frame] = picture;
    this.shown[frame] = version;
    this.drawTile(frame);
  }

  /* A frame's picture; a prompt frame's is known before the run starts. */
  picture(frame) {
    if (this.pictures[frame] || frame >= this.plan.prompts) return this.pictures[frame];
    const given = document.querySelectorAll(".ar-prompt img")[frame];
    return given && given.complete ? given : null;
  }

  level(frame) {
    if (this.value && this.value.run) return this.value.levels[frame];
    return this.plan && frame < this.plan.prompts ? 0 : 1;
  }

  state(frame) {
    const level = this.level(frame);
    if (frame < this.plan.prompts) return { name: "prompt", word: "P" + (frame + 1) };
    if (level <= 0) return { name: "done", word: "done" };
    if (level >= 1) return { name: "waiting", word: "noise" };
    return { name: "active", word: Math.round(100 * level) + " %" };
  }

  get finished() { return this.value && this.value.run ? this.value.finished : 0; }

  draw() {
    if (!this.plan || !this.root.isConnected) return;
    const frames = this.plan.frames;
    if (this.strip.childElementCount !== frames) this.build(frames);
    for (let frame = 0; frame < frames; frame++) this.drawTile(frame);
    this.drawLiveMap();
    this.tell();
  }

  build(frames) {
    this.strip.style.setProperty("--frames", frames);
    this.strip.replaceChildren(...Array.from({ length: frames }, (_, frame) => {
      const item = document.createElement("li"), tile = document.createElement("button");
      tile.type = "button";
      tile.className = "ar-tile";
      tile.tabIndex = frame === 0 ? 0 : -1;
      tile.innerHTML = '<canvas></canvas><span class="ar-noise"><i></i></span><span class="ar-word"></span>';
      tile.addEventListener("click", () => { if (frame < this.finished) { this.setPlaying(false); this.seek(frame); } });
      item.append(tile);
      return item;
    }));
  }

  moveFocus(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const tiles = [...this.strip.querySelectorAll(".ar-tile")], at = tiles.indexOf(document.activeElement);
    if (!move || at < 0 || !tiles[at + move]) return;
    event.preventDefault();
    tiles[at].tabIndex = -1;
    tiles[at + move].tabIndex = 0;
    tiles[at + move].focus();
  }

  drawTile(frame) {
    const item = this.strip.children[frame];
    if (!item || !this.plan) return;
    const tile = item.firstElementChild, [canvas, bar, word] = tile.children;
    const side = canvas.clientWidth || 64, state = this.state(frame), level = this.level(frame);
    drawFrame(context(canvas, side, side), this.picture(frame), level, frame, side);
    tile.dataset.state = state.name;
    bar.firstElementChild.style.width = 100 * level + "%";
    word.textContent = state.word;
    const words = { prompt: "prompt frame", done: "finished", waiting: "still noise", active: state.word + " noise left" };
    tile.setAttribute("aria-label", "Frame " + (frame + 1) + ", " + words[state.name]);
  }

  drawLiveMap() {
    const first = this.strip.children[0], second = this.strip.children[1];
    if (!first || !first.offsetWidth) return;
    const column = first.getBoundingClientRect().width;
    const step = second ? second.getBoundingClientRect().left - first.getBoundingClientRect().left : column;
    const width = step * (this.plan.frames - 1) + column;
    this.map.style.width = width + "px";
    drawMap(this.map, this.plan, {
      width, height: this.map.clientHeight, column, left: (frame) => frame * step,
      now: this.value && this.value.run ? this.value.iteration : null,
      accent: themeColour(this.root, "--ar-accent-line"), veil: themeColour(this.root, "--ar-veil"),
    });
    this.follow(step);
  }

  /* Keep the first frame in progress in view of a long strip, unless the visitor scrolled a moment ago. */
  follow(step) {
    const pane = this.find(".ar-scroll"), x = this.finished * step;
    if (!this.running || performance.now() - this.touched < 4000 || pane.scrollWidth <= pane.clientWidth) return;
    const share = (x - pane.scrollLeft) / pane.clientWidth;
    if (share < 0 || share > 0.7) {
      pane.scrollTo({ left: Math.max(0, x - 0.35 * pane.clientWidth), behavior: this.quiet ? "auto" : "smooth" });
    }
  }

  /* Everything that is said in words. Live regions are written only when their words change. */
  tell() {
    const v = this.value || {}, on = Boolean(v.run), plan = this.plan;
    const set = (selector, text) => { const e = this.find(selector); if (e.textContent !== text) e.textContent = text; };
    set(".ar-phase", v.title || "");
    set(".ar-message", v.message || "");
    set(".ar-spoken", on ? v.title + ". " + this.finished + " of " + plan.frames + " frames finished." : "");
    this.find(".ar-run").dataset.phase = v.phase || "idle";
    const share = on ? v.iteration / plan.calls : 0, bar = this.find(".ar-bar");
    bar.setAttribute("aria-valuenow", String(Math.round(100 * share)));
    bar.firstElementChild.style.width = 100 * share + "%";
    const active = on ? v.levels.filter((level) => level > 0 && level < 1).length : 0;
    const mean = on ? v.levels.reduce((sum, level) => sum + level, 0) / plan.frames : null;
    set(".ar-f-frames", on ? this.finished + " of " + plan.frames : "\u2013");
    set(".ar-f-calls", on ? v.iteration + " of " + plan.calls : "\u2013");
    set(".ar-f-flight", on ? String(active) : "\u2013");
    set(".ar-f-mean", on ? Math.round(100 * mean) + " %" : "\u2013");
    set(".ar-f-time", v.time || "\u2013");
    set(".ar-f-seed", on ? String(v.seed) : "\u2013");
    set(".ar-calls-end", "call " + plan.calls);
    set(".ar-meaning", gapMeaning(plan));
    this.map.setAttribute("aria-label", "Noise map: " + plan.frames + " frames, " + plan.calls + " model calls, gap " +
      plan.gap + (on ? "; after call " + v.iteration + ", " + this.finished + " finished, " + active + " in progress" : ""));
  }

  /* ---- Player ---- */

  get playable() {
    if (this.finished >= 2 || !this.running) return this.finished;
    return this.pictures.some(Boolean) ? this.plan.frames : 0;
  }

  setPlaying(playing) {
    this.playing = playing;
    const button = this.find(".ar-play");
    button.setAttribute("aria-label", playing ? "Pause" : "Play");
    button.dataset.playing = String(playing);
  }

  seek(frame) {
    this.position = frame;
    this.lastStep = performance.now();
  }

  play(now) {
    if (!this.root.isConnected) return;
    requestAnimationFrame((next) => this.play(next));
    if (document.hidden || !this.plan) return;
    const count = this.playable, fps = +this.find(".ar-fps").value;
    if (this.playing && count && now - (this.lastStep || 0) >= 1000 / fps) {
      // The last frame rests a little longer, so that the loop can be seen as one.
      const rest = this.position === count - 1 ? 3 : 1;
      if (now - this.lastStep >= rest * 1000 / fps || !this.lastStep) {
        this.position = (this.position + 1) % count;
        this.lastStep = now;
      }
    }
    if (this.position >= count) this.position = 0;
    this.show(count);
  }

  show(count) {
    const screen = this.find(".ar-screen"), side = screen.clientWidth;
    const frame = this.position, level = count ? this.level(frame) : 1;
    const stamp = [this.run, frame, this.shown[frame], level, side, Boolean(this.pictures[frame]), count].join();
    if (stamp === this.stamp || !side) return;
    this.stamp = stamp;
    drawFrame(context(screen, side, side), count ? this.pictures[frame] : null, level, frame, side);
    const seek = this.find(".ar-seek");
    seek.max = String(Math.max(count - 1, 0));
    seek.value = String(frame);
    seek.disabled = this.find(".ar-play").disabled = !count;
    const label = count ? "Frame " + (frame + 1) + " of " + count : "No frame yet";
    this.find(".ar-count").textContent = count ? frame + 1 + " / " + count : "0 / 0";
    this.find(".ar-badge").textContent = !count ? "" : level > 0 ? "the model's guess" : "";
    screen.setAttribute("aria-label", label);
    [...this.strip.children].forEach((item, index) => {
      const tile = item.firstElementChild;
      if (count && index === frame) tile.setAttribute("aria-current", "true");
      else tile.removeAttribute("aria-current");
    });
  }
}

function mountStage(element, props, watch) {
  studio.stage = new Stage(element, props, watch);
  if (studio.planView) studio.planView();
}

window.ardiffStudio = {
  makePlan, stepIndex, smallestGap, planCounts, planSentence, setControls, mountPlan, mountStage, studio,
};
})();
