/** Entry point: connects the parts of the page. */

import { setKeyPrompt } from "./api.js";
import * as camera from "./camera.js";
import * as compare from "./compare.js";
import { announce, element, note } from "./dom.js";
import * as gallery from "./gallery.js";
import { add, events, modelOf, photographs, progress, remove, retry, withStatus } from "./grading.js";
import * as heat from "./heat.js";
import { askForKey } from "./key_form.js";
import * as result from "./result.js";
import { csv, save } from "./table.js";
import { gradeName, language, percent, problemWords, say, setLanguage, translate } from "./words.js";

function take(files) {
  const [first] = add(files);
  if (first) gallery.select(first);
}

// --- language ------------------------------------------------------------------------------------------------

function speak() {
  document.documentElement.lang = language;
  document.title = say("title");
  translate(document);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  gallery.translateAll();
  result.show(gallery.selected);
  compare.refresh();
  showState();
  showModel();
}

async function showModel() {
  try {
    const model = await modelOf();
    const { model_version: version, precision, device, synthetic } = model;
    element("synthetic").hidden = !synthetic;
    if (model.symptom === "micro_keratin") element("subtitle").textContent = say("subtitle.micro_keratin");
    element("model").textContent = say("model", { version, precision, device });
    element("about-rows").replaceChildren(...about(model));
    element("about").hidden = false;
  } catch (error) {
    element("model").textContent = say("model.unknown", { reason: problemWords(error) });
  }
}

/** What a user of an AI device must know: version, task, training data, expected performance, limits, use. */
function about({ model_version: version, created_at: created, synthetic, symptom, other_symptoms: others, metrics: { val } }) {
  const symptoms = [symptom, ...others];
  const round = (value) => value.toFixed(2);
  const interval = val?.intervals?.qwk;
  const rows = {
    version: say("about.made", { version, date: created.slice(0, 10) }),
    task: symptoms.join() === "micro_keratin"
      ? say("about.task.value")
      : say("about.task.several", { symptoms: symptoms.map((name) => say(`symptom.${name}`)).join(", ") }),
    training: say(synthetic ? "about.training.synthetic" : "about.training.value"),
    performance: interval
      ? say("about.performance.value", {
        top1: percent(val.top1, 0), count: val.n, qwk: round(val.qwk), low: round(interval.low), high: round(interval.high),
      })
      : say("about.performance.none"),
    limits: say("about.limits.value"),
    use: `${say("no-diagnosis")} ${say("intended-use")}`,
  };
  return Object.entries(rows).flatMap(([name, text]) => [
    Object.assign(document.createElement("dt"), { textContent: say(`about.${name}`) }),
    Object.assign(document.createElement("dd"), { textContent: text }),
  ]);
}

// --- progress ----------------------------------------------------------------------------------------------

function showState() {
  const { done, total } = progress();
  element("progress").hidden = done === total;
  element("progress-text").textContent = say("progress", { done, total });
  Object.assign(element("progress-bar"), { max: total || 1, value: done });

  const wait = photographs.find((each) => each.wait)?.wait;
  note("wait", wait ? say("wait", wait) : "");
  note("summary", photographs.length ? summary() : "");

  const [graded, failed] = [withStatus("graded").length, withStatus("failed").length];
  document.body.classList.toggle("has-photographs", photographs.length > 0);
  element("gallery-actions").hidden = !photographs.length;
  element("retry-failed").hidden = !failed;
  element("compare-two").hidden = graded < 2;
  element("compare-this").hidden = graded < 2 || gallery.selected?.status !== "graded";
  element("csv").hidden = !(graded + failed);
}

function summary() {
  const graded = withStatus("graded");
  const counts = new Map();  // by grade name, in the order of grades
  for (const { model, answer } of graded.toSorted((one, other) => one.answer.grade - other.answer.grade)) {
    const name = gradeName(model, answer.grade);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const grades = [...counts].map(([name, count]) => `${name} ${count}`).join(", ");
  const [refer, failed] = [graded.filter(({ answer }) => answer.refer).length, withStatus("failed").length];
  return [
    `${[say("summary", { count: photographs.length }), grades].filter(Boolean).join(": ")}.`,
    refer && say("summary.refer", { count: refer }),
    failed && say("summary.failed", { count: failed }),
  ].filter(Boolean).join(" ");
}

let isDue = false;

/** Updates the state once per batch of changes. */
function showStateSoon() {
  if (isDue) return;
  isDue = true;
  queueMicrotask(() => {
    isDue = false;
    showState();
  });
}

events.addEventListener("changed", ({ detail: photograph }) => {
  if (photograph === gallery.selected) result.show(photograph);
  showStateSoon();
});
events.addEventListener("removed", showStateSoon);
events.addEventListener("idle", ({ detail: batch }) => {
  announce(batch.length === 1 ? result.inOneLine(batch[0]) : say("finished", { summary: summary() }));
  showState();
});

setKeyPrompt(askForKey);

// --- controls ---------------------------------------------------------------------------------------------

element("file").addEventListener("change", ({ target }) => {
  take(target.files);
  target.value = "";  // so that the same file can be chosen again
});

// The whole page accepts drops: outside of the field the browser would open the file instead of the page.
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    setLanguage(button.dataset.language);
    speak();
  });
}

element("retry").addEventListener("click", () => retry([gallery.selected]));
element("retry-failed").addEventListener("click", () => retry(withStatus("failed")));
element("compare-two").addEventListener("click", () => compare.open());
element("compare-this").addEventListener("click", () => compare.open(gallery.selected));
element("csv").addEventListener("click", () => save(csv(withStatus("graded", "failed")), "scalp-results.csv"));
element("print").addEventListener("click", () => print());
addEventListener("beforeprint", () => {
  element("about").open = true;
});
element("remove").addEventListener("click", () => {
  const { name } = gallery.selected;
  remove(gallery.selected);
  announce(say("removed", { name }));
  element(gallery.selected ? "remove" : "file").focus();
});
element("remove-all").addEventListener("click", () => {
  if (!confirm(say("remove-all.sure", { count: photographs.length }))) return;
  for (const photograph of [...photographs]) remove(photograph);
  element("file").focus();
});

gallery.setUp((photograph) => {
  result.show(photograph);
  showState();
});
camera.setUp(take);
compare.setUp();
heat.setUp();
speak();
