/* The prompt frames: what was given with its crop, and below it what the model sees; order and removal by mouse or keys.
 *
 * The value is { tiles: [{ source, crop, seen }], order, words, message, bad }: tiles never change, `order` says which of
 * them are used, `words` is the prompt on the command line. The order goes to the page's hidden field, which is what a run is asked with.
 */
(() => {
"use strict";

function mountPrompt(element, props, watch) {
  const list = element.querySelector(".ar-given"), edit = element.querySelector(".ar-edit");
  const caption = element.querySelector(".ar-caption");
  let tiles = [], order = [], chosen = -1, dragged = -1;

  const publish = () => { tell(); window.ardiffStudio.setField("ar-order", JSON.stringify(order)); };

  /* The prompt on the command line: a video's options as they are, pictures in the order of the tiles. */
  const tell = () => {
    const words = props.value.words, video = words[0] === "--prompt";
    window.ardiffStudio.studio.promptWords = !order.length ? [] : video ? words
      : order.filter((index) => words[index]).flatMap((index) => ["--prompt", words[index]]);
  };

  /* Move the tile at place `from` to place `to`; outside the list nothing happens. */
  const move = (from, to) => {
    if (from < 0 || to < 0 || to >= order.length || from === to) return;
    order.splice(to, 0, ...order.splice(from, 1));
    if (chosen === from) chosen = to;
    publish();
    draw(to);
  };
  const remove = (place) => {
    if (place < 0) return;
    order.splice(place, 1);
    chosen = -1;
    publish();
    draw(Math.min(place, order.length - 1));
  };

  function picture(tile) {
    const [left, top, right, bottom] = tile.crop.map((part) => 100 * part);
    const box = document.createElement("span"), image = new Image(), frame = document.createElement("i");
    box.className = "ar-source";
    image.src = tile.source;
    image.alt = "";
    image.draggable = false;
    frame.style.cssText = `left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%`;
    const inner = document.createElement("span");
    inner.append(image, frame);
    box.append(inner);
    return box;
  }

  function build(tile, place) {
    const item = document.createElement("li"), button = document.createElement("button"), seen = new Image();
    button.type = "button";
    button.className = "ar-given-tile";
    button.tabIndex = place === 0 ? 0 : -1;
    button.setAttribute("aria-pressed", String(place === chosen));
    button.setAttribute("aria-label", `Prompt frame ${place + 1} of ${order.length}. ` +
      "Shift and arrow keys move it, Delete removes it.");
    seen.src = tile.seen;
    seen.className = "ar-seen";
    seen.alt = `Prompt frame ${place + 1}, as the model sees it`;
    seen.draggable = false;
    button.append(picture(tile), seen);
    button.draggable = true;
    button.addEventListener("click", () => { chosen = chosen === place ? -1 : place; draw(place); });
    button.addEventListener("dragstart", (event) => { dragged = place; event.dataTransfer.setData("text/plain", ""); });
    item.addEventListener("dragover", (event) => { if (dragged >= 0) event.preventDefault(); });
    item.addEventListener("drop", (event) => { event.preventDefault(); move(dragged, place); dragged = -1; });
    item.append(button);
    return item;
  }

  function draw(focused) {
    list.replaceChildren(...order.map((index, place) => build(tiles[index], place)));
    edit.hidden = chosen < 0 || !order.length;
    const [left, right] = edit.querySelectorAll("button");
    left.disabled = chosen <= 0;
    right.disabled = chosen >= order.length - 1;
    const left_out = tiles.length - order.length;
    caption.textContent = props.value.message || (order.length
      ? "Above: what you gave, and its crop. Below: as the model sees it." + (left_out ? ` ${left_out} left out.` : "")
      : tiles.length ? "All frames are removed: the run starts from nothing." : "");
    element.querySelector(".ar-prompt").classList.toggle("ar-bad", Boolean(props.value.bad));
    caption.setAttribute("role", props.value.bad ? "alert" : "note");
    if (list.children[focused]) list.children[focused].firstElementChild.focus();
  }

  list.addEventListener("keydown", (event) => {
    const place = [...list.children].findIndex((item) => item.contains(document.activeElement));
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (place < 0) return;
    if (event.key === "Delete" || event.key === "Backspace") remove(place);
    else if (step && event.shiftKey) move(place, place + step);
    else if (step && list.children[place + step]) list.children[place + step].firstElementChild.focus();
    else return;
    event.preventDefault();
  });
  edit.addEventListener("click", (event) => {
    const step = event.target.dataset.move;
    if (step === "0") remove(chosen);
    else if (step) move(chosen, chosen + +step);
  });

  const take = () => {
    if (!props.value) return;
    tiles = props.value.tiles;
    order = [...props.value.order];
    chosen = dragged = -1;
    tell();
    draw(-1);
  };
  watch("value", take);
  take();
}

window.ardiffStudio = window.ardiffStudio || {};
Object.assign(window.ardiffStudio, { mountPrompt });
})();
