/** Heatmap as an overlay of the selected photo. */

import { element, note } from "./dom.js";
import { send } from "./grading.js";
import { isBlank, place } from "./overlay.js";
import { gradeName, problemWords, say } from "./words.js";

const show = element("heat-show");
const choice = element("heat-grade");
const opacity = element("heat-opacity");
const heat = element("heat");

let photograph = null;  // the graded photo that is shown, or null
let pending = new AbortController();

export function setUp() {
  show.addEventListener("change", update);
  choice.addEventListener("change", update);
  opacity.addEventListener("input", () => { heat.style.opacity = opacity.value / 100; });
  heat.style.opacity = opacity.value / 100;
}

/** Sets the photo whose heatmap may be requested; null for none. */
export function heatOf(shown) {
  photograph = shown;
  element("heat-controls").hidden = !photograph;
  if (photograph) nameGrades(photograph.model);
  update();
}

function nameGrades(model) {
  const kept = choice.value;
  choice.replaceChildren(
    new Option(say("heat.likeliest"), ""),
    ...model.grades.map(({ grade }) => new Option(gradeName(model, grade), grade)),
  );
  choice.value = kept;
}

async function update() {
  pending.abort();
  pending = new AbortController();
  const { signal } = pending;
  heat.hidden = true;
  element("heat-settings").hidden = !show.checked;
  note("heat-note", "");
  if (!photograph || !show.checked) return;
  const grade = choice.value === "" ? photograph.answer.grade : Number(choice.value);
  try {
    const picture = await heatFor(photograph, grade, signal);
    if (signal.aborted) return;
    if (picture) await lay(picture, grade, signal);
    else note("heat-note", say("heat.not-there"));
  } catch (error) {
    if (!signal.aborted) note("heat-note", say("heat.failed", { reason: problemWords(error) }));
  }
}

/** Heatmap as a data URL, fetched once; undefined if the server makes no heatmaps. */
async function heatFor(of, grade, signal) {
  if (!of.heats.has(grade)) {
    note("heat-note", say("heat.busy"));
    const onWait = (wait) => note("heat-note", say(wait ? "wait" : "heat.busy", wait ?? {}));
    const answer = await send(of, { heatmap: true, heatmap_grade: grade }, signal, onWait);
    if (answer.heatmap) of.heats.set(grade, `data:image/png;base64,${answer.heatmap.png}`);
  }
  return of.heats.get(grade);
}

async function lay(picture, grade, signal) {
  const name = gradeName(photograph.model, grade);
  heat.src = picture;
  heat.alt = say("heat.alt", { grade: name });
  await heat.decode();
  signal.throwIfAborted();
  place(heat, element("photograph"), photograph.model.preprocess.resize);
  heat.hidden = false;
  note("heat-note", isBlank(heat) ? say("heat.none", { grade: name }) : "");
}
