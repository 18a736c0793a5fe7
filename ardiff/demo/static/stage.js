/* The stage: the player, the film strip that clears up, the live noise map, every frame's history, and earlier runs as rows.
 *
 * All of it is drawn from the run's JSON that the server sends; pictures are decoded once and kept in the browser.
 */
(() => {
"use strict";

const api = window.ardiffStudio, studio = api.studio;
const { makePlan, planCounts, gapMeaning, context, drawFrame, drawMap, themeColour, redrawOnResize, mapSvg, mapPng } = api;

const ROWS = 4;
const PAST_SIDE = 96, PAST_FRAMES = 24, PAST_BYTES = 40e6;
/* Under reduced motion, how long a tile near pure noise keeps its picture, in milliseconds. */
const QUIET_MS = 334;

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

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
    this.past = [];
    this.rows = [];
    this.opened = null;
    this.stats = { received: 0, drawn: 0, blank: 0, bytes: 0 };
    this.reducedMotion = matchMedia("(prefers-reduced-motion: reduce)"); // may change while the page is open
    this.playing = !this.reducedMotion.matches;
    this.position = 0;
    this.touched = 0;
    this.find(".ar-play").addEventListener("click", () => this.setPlaying(!this.playing));
    this.find(".ar-seek").addEventListener("input", (event) => this.seek(+event.target.value));
    this.find(".ar-scroll").addEventListener("pointerdown", () => { this.touched = performance.now(); });
    this.find(".ar-scroll").addEventListener("wheel", () => { this.touched = performance.now(); }, { passive: true });
    this.strip.addEventListener("keydown", (event) => this.moveFocus(event));
    this.root.addEventListener("keydown", (event) => this.playerKey(event));
    this.root.querySelectorAll(".ar-choice input").forEach((input) => input.addEventListener("change", () => { this.stamp = ""; }));
    for (const [name, by] of [[".ar-back", -1], [".ar-forth", 1]]) {
      this.find(name).addEventListener("click", () => this.nudge(by));
    }
    this.find(".ar-past-close").addEventListener("click", () => this.openPast(null));
    this.find(".ar-svg").addEventListener("click", () =>
      save(new Blob([mapSvg(this.plan)], { type: "image/svg+xml" }), "noise-map.svg"));
    this.find(".ar-png").addEventListener("click", async () => save(await mapPng(this.plan), "noise-map.png"));
    this.setPlaying(this.playing);
    watch("value", () => this.receive(props.value));
    redrawOnResize(this.find(".ar-scroll"), () => this.draw());
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
    if (value.run !== this.run) this.begin(value);
    this.value = value;
    if (value.run) {
      this.stats.received++;
      this.stats.bytes += (value.pics || []).reduce((sum, picture, frame) =>
        sum + (this.asked[frame] === value.rev[frame] ? 0 : picture.length), 0);
    }
    if (value.model) this.learn(value.model);
    if (value.run) this.plan = makePlan(value.frames, value.steps, value.gap, value.prompts);
    document.documentElement.dataset.ardiffPhase = value.phase;
    (value.pics || []).forEach((picture, frame) => this.decode(picture, frame));
    this.draw();
    if (value.run) this.stats.drawn++;
    document.dispatchEvent(new CustomEvent("ardiff:run", { detail: value }));
  }

  /* A run measures its model: the estimate of the next one is better, as long as that is of the same model. */
  learn(model) {
    if (model.name !== studio.model.name || JSON.stringify(model) === JSON.stringify(studio.model)) return;
    studio.model = model;
    if (studio.planView) studio.planView();
  }

  /* Another run comes onto the stage: the one before becomes a row, or is forgotten. */
  begin(value) {
    const old = this.value;
    const kept = value.keep_rows && old && old.run && old.finished > 0;
    if (kept) {
      this.rows.push({ value: old, plan: this.plan, pictures: this.pictures });
      while (this.rows.length > ROWS - 1) this.dropRow(0);
    } else {
      forget(this.pictures);
      if (!value.keep_rows) while (this.rows.length) this.dropRow(0);
    }
    this.past.forEach((looks) => forget(looks.map((look) => look.picture)));
    this.run = value.run;
    this.pictures = [];
    this.shown = [];
    this.asked = [];
    this.past = [];
    this.calm = [];
    this.position = 0;
    this.stats = { received: 0, drawn: 0, blank: 0, bytes: 0 };
    this.openPast(null);
    this.buildRows();
  }

  /* Decode in the background and keep the old picture until the new one is there: a tile never goes blank. */
  async decode(source, frame) {
    const version = this.value.rev[frame], run = this.run, call = this.value.iteration, level = this.value.levels[frame];
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
    this.remember(frame, picture, call, level);
  }

  /* Keep a small copy of every look of a frame; when there are too many, every other one goes. */
  async remember(frame, picture, call, level) {
    const run = this.run, side = Math.min(PAST_SIDE, picture.width);
    const copy = await createImageBitmap(picture, { resizeWidth: side, resizeHeight: side, resizeQuality: "high" });
    if (this.run !== run) { copy.close(); return; }
    const looks = this.past[frame] = this.past[frame] || [];
    looks.push({ picture: copy, call, level });
    looks.sort((a, b) => a.call - b.call);
    const most = Math.min(PAST_FRAMES, Math.max(4, Math.floor(PAST_BYTES / (4 * side * side * this.plan.frames))));
    if (looks.length > most) {
      this.past[frame] = looks.filter((look, index) => {
        const stays = index % 2 === 0 || index === looks.length - 1;
        if (!stays) look.picture.close();
        return stays;
      });
    }
    if (this.opened === frame) this.drawPast();
  }

  openPast(frame) {
    this.opened = frame;
    this.find(".ar-past").hidden = frame === null;
    if (frame !== null) this.drawPast();
  }

  /* One frame over the run: what the model took it for, call by call. */
  drawPast() {
    const frame = this.opened, looks = this.past[frame] || [];
    this.find(".ar-past h3").textContent = "Frame " + (frame + 1) + " over the run";
    this.find(".ar-past p").textContent = frame < this.plan.prompts ? "A prompt frame: it is clean from the start."
      : looks.length ? "The model's guess of this frame, call by call, and the noise it still had."
        : "No guess of this frame was drawn yet.";
    this.find(".ar-looks").replaceChildren(...looks.map((look) => {
      const item = document.createElement("li"), canvas = document.createElement("canvas");
      const words = look.level > 0 ? "call " + look.call + ", " + Math.round(100 * look.level) + " %" : "call " + look.call + ", done";
      context(canvas, 64, 64).drawImage(look.picture, 0, 0, 64, 64);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", "Frame " + (frame + 1) + " at " + words);
      item.append(canvas, Object.assign(document.createElement("span"), { textContent: words }));
      return item;
    }));
  }

  /* ---- Earlier runs as rows ---- */

  dropRow(index) {
    forget(this.rows.splice(index, 1)[0].pictures);
  }

  buildRows() {
    this.find(".ar-rows").replaceChildren(...this.rows.map((row, index) => {
      const v = row.value, item = document.createElement("li");
      item.innerHTML = '<canvas class="ar-row-screen" role="img"></canvas><div><h3></h3><p></p>' +
        '<canvas class="ar-row-strip" role="img"></canvas></div><button type="button" aria-label="Remove this row">Remove</button>';
      item.querySelector("h3").textContent = v.row;
      item.querySelector("p").textContent = rowFacts(v, row.plan);
      item.querySelector(".ar-row-screen").setAttribute("aria-label", "Video of the run with " + v.row);
      item.querySelector(".ar-row-strip").setAttribute("aria-label", v.finished + " frames of the run with " + v.row);
      item.querySelector("button").addEventListener("click", () => { this.dropRow(index); this.buildRows(); });
      row.item = item;
      return item;
    }));
    this.rows.forEach((row) => this.drawRowStrip(row));
  }

  drawRowStrip(row) {
    const canvas = row.item.querySelector(".ar-row-strip"), count = row.value.finished;
    const side = Math.min(40, Math.max(8, canvas.clientWidth / count - 2)), pen = context(canvas, canvas.clientWidth, 40);
    for (let frame = 0; frame < count; frame++) {
      if (row.pictures[frame]) pen.drawImage(row.pictures[frame], frame * (side + 2), 0, side, side);
    }
  }

  drawRows() {
    for (const row of this.rows) {
      const canvas = row.item.querySelector(".ar-row-screen"), frame = Math.min(this.position, row.value.finished - 1);
      if (row.frame === frame || !row.pictures[frame] || !canvas.clientWidth) continue;
      row.frame = frame;
      drawFrame(context(canvas, canvas.clientWidth, canvas.clientWidth), row.pictures[frame], 0, frame, canvas.clientWidth);
    }
  }

  /* A frame's picture; a prompt frame's is known before the run starts. */
  picture(frame) {
    if (this.pictures[frame] || frame >= this.plan.prompts) return this.pictures[frame];
    const given = document.querySelectorAll(".ar-prompt .ar-seen")[frame];
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
      tile.addEventListener("click", () => {
        if (frame < this.finished) { this.setPlaying(false); this.seek(frame); }
        if (this.run) this.openPast(this.opened === frame ? null : frame);
      });
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
    const picture = this.picture(frame);
    if (!picture && this.shown[frame]) this.stats.blank++;
    if (!this.keepsCalm(frame, level)) drawFrame(context(canvas, side, side), picture, level, frame, side);
    tile.dataset.state = state.name;
    bar.firstElementChild.style.width = 100 * level + "%";
    word.textContent = state.word;
    const words = { prompt: "prompt frame", done: "finished", waiting: "still noise", active: state.word + " noise left" };
    tile.setAttribute("aria-label", "Frame " + (frame + 1) + ", " + words[state.name]);
  }

  /* Under reduced motion a tile that is nearly noise changes at most three times a second. */
  keepsCalm(frame, level) {
    if (!this.reducedMotion.matches || !this.running || level < 0.6 || level >= 1) return false;
    const now = performance.now();
    this.calm = this.calm || [];
    if (now - (this.calm[frame] || 0) < QUIET_MS) return true;
    this.calm[frame] = now;
    return false;
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
      window: (this.value && this.value.model || studio.model).window,
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
      pane.scrollTo({ left: Math.max(0, x - 0.35 * pane.clientWidth), behavior: this.reducedMotion.matches ? "auto" : "smooth" });
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
    set(".ar-row-name", on && this.rows.length ? v.row + ": " + rowFacts(v, plan) : "");
    set(".ar-calls-end", "call " + plan.calls);
    set(".ar-meaning", gapMeaning(plan));
    this.map.setAttribute("aria-label", "Noise map: " + plan.frames + " frames, " + plan.calls + " model calls, gap " +
      plan.gap + (on ? "; after call " + v.iteration + ", " + this.finished + " finished, " + active + " in progress" : ""));
  }

  /* ---- Player ---- */

  get playable() {
    if (!this.plan || !this.pictures.some(Boolean)) return 0;
    const everything = this.find(".ar-everything").checked && this.running;
    return everything || (this.finished < 2 && this.running) ? this.plan.frames : this.finished;
  }

  nudge(by) {
    const count = this.playable;
    if (!count) return;
    this.setPlaying(false);
    this.seek((this.position + by + count) % count);
  }

  /* Space plays and pauses, arrows step; not in a field, on a button of its own, or on the film strip. */
  playerKey(event) {
    if (event.target.closest("input, select, button, .ar-strip")) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === " ") this.setPlaying(!this.playing);
    else if (by) this.nudge(by);
    else return;
    event.preventDefault();
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
    this.drawRows();
  }

  show(count) {
    const screen = this.find(".ar-screen"), side = screen.clientWidth;
    const frame = this.position, noisy = this.find(".ar-noisy").checked;
    const left = count ? this.level(frame) : 1, level = this.pictures[frame] && !noisy ? 0 : left;
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
    this.find(".ar-badge").textContent = !count || left <= 0 ? "" : noisy ? "its noise, drawn as grain" : "the model's guess";
    screen.setAttribute("aria-label", label);
    [...this.strip.children].forEach((item, index) => {
      const tile = item.firstElementChild;
      if (count && index === frame) tile.setAttribute("aria-current", "true");
      else tile.removeAttribute("aria-current");
    });
  }
}

function forget(pictures) {
  pictures.forEach((picture) => picture && picture.close && picture.close());
}

/* What a row cost: calls, seconds, and when its first new frame came. */
function rowFacts(value, plan) {
  const parts = [plan.calls + " calls", value.finished + " frames"];
  if (value.elapsed) parts.push(value.elapsed.toFixed(1) + " s");
  if (value.first != null) parts.push("first new frame after " + value.first.toFixed(1) + " s");
  return parts.join(", ");
}

function mountStage(element, props, watch) {
  studio.stage = new Stage(element, props, watch);
  if (studio.planView) studio.planView();
}

Object.assign(api, { mountStage });
})();
