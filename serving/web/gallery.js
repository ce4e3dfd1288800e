/** Gallery: a grid of thumbnails with one selected photo; arrow keys move the selection. */

import { element, fill } from "./dom.js";
import { events, photographs } from "./grading.js";
import { gradeName, say } from "./words.js";

export let selected = null;

const gallery = element("gallery");
const tiles = new Map();
let onSelect;

/** Sets up the gallery; `select` is called with each newly selected photo, or null. */
export function setUp(select) {
  onSelect = select;
  events.addEventListener("changed", ({ detail }) => show(detail));
  events.addEventListener("removed", ({ detail }) => drop(detail));
  gallery.addEventListener("keydown", move);
}

export function select(photograph) {
  mark(selected, false);
  selected = photograph;
  mark(selected, true);
  onSelect(photograph);
}

/** Updates all thumbnails in the current language. */
export function translateAll() {
  photographs.forEach(show);
}

/** Short state of a photo: its grade, or its progress. */
export function stateOf({ status, model, answer }) {
  return status === "graded" ? gradeName(model, answer.grade) : say(`tile.${status}`);
}

function mark(photograph, isSelected) {
  const tile = tiles.get(photograph);
  if (!tile) return;
  tile.setAttribute("aria-current", String(isSelected));
  tile.tabIndex = isSelected ? 0 : -1;
}

function show(photograph) {
  const tile = tiles.get(photograph) ?? create(photograph);
  const refer = photograph.answer?.refer && photograph.status === "graded";
  tile.dataset.status = photograph.status;
  tile.dataset.grade = photograph.answer?.grade ?? "";
  tile.querySelector('[data-slot="state"]').textContent = stateOf(photograph);
  tile.querySelector('[data-slot="mark"]').textContent = refer ? say("tile.refer") : "";
}

function create(photograph) {
  const copy = fill("tile", { name: photograph.name });
  const tile = copy.querySelector("button");
  const image = tile.querySelector("img");
  image.addEventListener("error", () => image.remove());  // not an image, or a TIFF, which most browsers do not show
  image.src = photograph.url;
  tile.addEventListener("click", () => select(photograph));
  tiles.set(photograph, tile);
  gallery.append(copy);
  gallery.hidden = false;
  return tile;
}

function drop(photograph) {
  const tile = tiles.get(photograph);
  const hadFocus = document.activeElement === tile;
  const item = tile.parentElement;
  const neighbor = (item.nextElementSibling ?? item.previousElementSibling)?.firstElementChild;
  item.remove();
  tiles.delete(photograph);
  gallery.hidden = !tiles.size;
  if (photograph !== selected) return;
  select(photographs.find((each) => tiles.get(each) === neighbor) ?? null);
  if (hadFocus) neighbor?.focus();
}

function move(event) {
  const all = [...gallery.querySelectorAll("button")];
  const at = all.indexOf(document.activeElement);
  const columns = all.filter(({ offsetTop }) => offsetTop === all[0].offsetTop).length;
  const places = {
    ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - columns, ArrowDown: at + columns,
    Home: 0, End: all.length - 1,
  };
  if (at < 0 || !(event.key in places)) return;
  event.preventDefault();
  const to = all[places[event.key]];
  if (!to) return;
  to.focus();
  to.click();
}
