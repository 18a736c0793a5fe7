/* What belongs to the page as a whole: its hidden fields, the link and the command for the current settings, and the runs
 * of this visit. Nothing here is sent to the server until the visitor asks for something.
 */
(() => {
"use strict";

const KEPT_RUNS = 12;
const api = window.ardiffStudio = window.ardiffStudio || {};

/* Write a hidden field of the page as if it had been typed, so that the page takes the value up. */
function setField(id, text) {
  const field = document.querySelector(`#${id} textarea, #${id} input`);
  if (!field || field.value === text) return;
  const prototype = field instanceof HTMLTextAreaElement ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(prototype.prototype, "value").set.call(field, text);
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

/* ---- Link and command ------------------------------------------------------------------------------------------- */

/* A word for the shell: quoted only where it must be. */
function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\"'\"'") + "'";
}

function number(value) {
  return String(Math.round(value * 1e6) / 1e6);
}

/* `c`: the controls; `gaps` is a number or a list. */
function commandLine(c) {
  const words = ["ardiff", "generate", "--model", c.model];
  if (c.scene) words.push("--scene", c.scene);
  words.push("--num-frames", number(c.frames), "--ar-step", [].concat(c.gaps).join(","), "--steps", number(c.steps));
  words.push("--guidance", number(c.guidance), "--seed", number(c.seed));
  words.push(...c.promptWords);
  return words.map(quoted).join(" ");
}

/* The settings as a query; prompt frames do not fit into a link. */
function settingsQuery(c) {
  const query = new URLSearchParams({
    model: c.model, scene: c.scene || "", length: c.frames, steps: c.steps, gap: [].concat(c.gaps).join(","), guidance: c.guidance,
    seed: c.seed,
  });
  return query.toString().replaceAll("%2C", ",");
}

function mountShare(element) {
  const link = element.querySelector(".ar-link"), command = element.querySelector(".ar-command");
  const tell = () => {
    const c = api.studio.controls && { ...api.studio.controls, ...api.studio.asked, promptWords: api.studio.promptWords };
    if (!c || c.seed == null) return;
    link.value = location.origin + location.pathname + "?" + settingsQuery(c);
    command.value = commandLine(c);
  };
  element.querySelectorAll("button").forEach((button) => button.addEventListener("click", async () => {
    const field = element.querySelector(button.dataset.copies);
    field.select();
    await (navigator.clipboard ? navigator.clipboard.writeText(field.value) : document.execCommand("copy"));
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
  document.addEventListener("ardiff:controls", tell);
  tell();
}

/* ---- The runs of this visit ------------------------------------------------------------------------------------- */

function mountHistory(element, props, watch, trigger) {
  const list = element.querySelector(".ar-visits"), runs = [];
  const draw = () => {
    element.querySelector(".ar-history").hidden = !runs.length;
    list.replaceChildren(...runs.map((run) => {
      const item = document.createElement("li"), button = document.createElement("button"), image = new Image();
      button.type = "button";
      image.src = run.thumb;
      image.alt = "";
      button.append(image, Object.assign(document.createElement("span"), { textContent: run.label }));
      button.setAttribute("aria-label", "Show this run again: " + run.label);
      button.addEventListener("click", () => trigger("select", { run: run.id }));
      item.append(button);
      return item;
    }));
  };
  document.addEventListener("ardiff:run", (event) => {
    const v = event.detail;
    if (!v.run || !["done", "failed"].includes(v.phase) || !v.finished || runs.some((run) => run.id === v.run)) return;
    const gap = typeof v.gap === "number" ? "gap " + v.gap : "drawn gaps";
    runs.unshift({ id: v.run, thumb: v.pics[v.finished - 1], label: `${v.finished} frames, ${gap}, seed ${v.seed}` });
    runs.length = Math.min(runs.length, KEPT_RUNS);
    draw();
  });
}

Object.assign(api, { setField, commandLine, settingsQuery, mountShare, mountHistory });
})();
