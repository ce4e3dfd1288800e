/** Aids that a reader may ask for: the heatmap of the model's answer, and training images that look alike.

Both are hidden at first for each photo, so that the reader's own look comes first: readers tend to follow what
a model shows. The server sends them after it has recorded that the reader asked.
*/

import { announce, element, fill, note } from "./dom.js";
import { isBlank, place } from "./overlay.js";
import { call, fetchPicture } from "./requests.js";
import { gradeName, problemWords, say } from "./words.js";

const heat = element("heat");
const buttons = { heatmap: element("heatmap-toggle"), neighbors: element("neighbors-toggle") };

let review = null;
let image = null;  // the shown photo
let alike = null;  // its similar training images, once they are shown
let heatUrl = null;  // blob URL of the shown heatmap

/** Shows the buttons of the aids that a review offers for the next photo; the aids themselves are hidden. */
export function offerAids(opened, next) {
  review = opened;
  image = next;
  alike = null;
  buttons.heatmap.hidden = !image.has_heatmap;
  buttons.neighbors.hidden = !image.has_neighbors;
  element("aids").hidden = !image.has_heatmap && !image.has_neighbors;
  hideHeatmap();
  hideNeighbors();
  note("aids-problem", "");
}

/** Writes the texts of the aids in the current language. */
export function showAids() {
  note("aid-keys", element("aids").hidden ? "" : say("aids.keys"));
  element("aids-note").textContent = say(image?.saw_model ? "aids.marked" : "aids.first");
  heat.alt = say("aids.heatmap.alt");
  if (!heat.hidden) note("heatmap-note", say(isBlank(heat) ? "aids.heatmap.none" : "heat.meaning"));
  if (alike) showNeighbors();
}

/** Shows or hides an aid, "heatmap" or "neighbors", of the photo whose picture is visible. */
export async function toggleAid(name) {
  if (buttons[name].hidden || !image) return;
  const asked = image;
  note("aids-problem", "");
  try {
    if (name === "heatmap" && !heat.hidden) hideHeatmap();
    else if (name === "neighbors" && !element("neighbors").hidden) hideNeighbors();
    else {
      await reveal(asked);
      if (name === "heatmap") await showHeatmap(asked);
      else await loadNeighbors(asked);
    }
  } catch (error) {
    if (asked === image) note("aids-problem", say("aids.failed", { reason: problemWords(error) }));
  }
}

async function reveal(asked) {
  if (asked.saw_model) return;
  await call(`/images/${asked.image_id}/reveal`, {});
  asked.saw_model = true;
  if (asked === image) showAids();
}

async function showHeatmap(asked) {
  const url = await fetchPicture(`/images/${asked.image_id}/heatmap`);
  if (asked !== image) return;
  if (heatUrl) URL.revokeObjectURL(heatUrl);
  heat.src = heatUrl = url;
  await heat.decode();
  if (asked !== image) return;
  place(heat, element("picture"), review.resize);
  heat.hidden = false;
  buttons.heatmap.setAttribute("aria-pressed", "true");
  showAids();
  announce(`${heat.alt} ${element("heatmap-note").textContent}`);
}

function hideHeatmap() {
  heat.hidden = true;
  heat.removeAttribute("src");
  note("heatmap-note", "");
  buttons.heatmap.setAttribute("aria-pressed", "false");
}

async function loadNeighbors(asked) {
  const { neighbors } = await call(`/images/${asked.image_id}/neighbors`);
  if (asked !== image) return;
  alike = neighbors;
  showNeighbors();
  element("neighbors").hidden = false;
  buttons.neighbors.setAttribute("aria-expanded", "true");
  announce(say("aids.neighbors.shown", { count: neighbors.length }));
}

function hideNeighbors() {
  element("neighbors").hidden = true;
  buttons.neighbors.setAttribute("aria-expanded", "false");
}

function showNeighbors() {
  element("neighbors-list").replaceChildren(...alike.map(({ grade, picture: jpeg }, number) => {
    const name = `${grade} ${gradeName(review, grade)}`;
    const row = fill("neighbor", { name });
    row.querySelector("li").dataset.grade = grade;
    const picture = row.querySelector("img");
    picture.alt = say("aids.neighbor.alt", { place: number + 1, name });
    if (jpeg) picture.src = `data:image/jpeg;base64,${jpeg}`;
    return row;
  }));
  element("neighbors-note").textContent = say(alike.length ? "aids.neighbors.meaning" : "aids.neighbors.none");
}
