/** Result of the selected photo: its picture, and its grade or problem. */

import { element, fill } from "./dom.js";
import { heatOf } from "./heat.js";
import { gradeName, percent, problemWords, reasonWords, say, words } from "./words.js";

const result = element("result");
const view = element("view");
const image = element("photograph");

let shown = null;
let picture = "loading";  // then seen, or broken

/** Shows the current state of a photo; null shows none. */
export function show(photograph) {
  const isOther = photograph !== shown;
  shown = photograph;
  element("nothing").hidden = Boolean(photograph);
  result.hidden = !photograph;
  if (isOther) load(photograph);
  if (!photograph) return;
  const { status } = photograph;
  result.setAttribute("aria-busy", String(status === "waiting" || status === "sending"));
  element("name").textContent = photograph.name;
  image.alt = say("photograph-alt", { name: photograph.name });
  element("verdict").replaceChildren(verdict(photograph));
  element("retry").hidden = status !== "failed";
  element("print").hidden = status !== "graded";
  offerHeat();
}

/** Result of a photo in one line, for screen readers. */
export function inOneLine({ status, model, answer, problem, name }) {
  if (status === "failed") return `${name}: ${say("failed")}. ${problemWords(problem)}`;
  return `${name}: ${gradeName(model, answer.grade)}. ${referral(answer).join(" ")}`;
}

function load(photograph) {
  picture = "loading";
  heatOf(null);
  if (!photograph) return;
  image.onload = () => {
    view.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    picture = "seen";
    offerHeat();
  };
  image.onerror = () => {
    picture = "broken";
    offerHeat();
  };
  image.src = photograph.url;
}

/** Offers a heatmap over a visible picture; a TIFF, which most browsers do not show, has a note instead. */
function offerHeat() {
  const isGraded = shown.status === "graded";
  view.hidden = picture === "broken";
  element("not-shown").hidden = !(isGraded && picture === "broken");
  heatOf(isGraded && picture === "seen" ? shown : null);
}

function verdict(photograph) {
  const { status, problem } = photograph;
  if (status === "graded") return graded(photograph);
  if (status !== "failed") return fill("busy", { state: say(status) });
  return fill("not-graded", {
    words: problemWords(problem),
    code: problem.code ?? "",
    detail: words(`problem.${problem.code}`) ? problem.detail ?? "" : "",
  });
}

function graded({ answer, model }) {
  const content = fill("graded", {
    name: gradeName(model, answer.grade),
    severity: say("severity", { grade: answer.grade, severity: answer.expected_severity.toFixed(2) }),
    set: gradeSet(answer.grade_set, model),
    "set-meaning": say("set.meaning", { coverage: percent(model.conformal.coverage, 0) }),
    file: answer.notes.map((note) => words(`note.${note}`) ?? note).join(" "),
    image: say("image", { id: answer.image_id, version: answer.model_version }),
  });
  const [lead, ...reasons] = referral(answer);
  const referralNote = content.querySelector('[data-slot="referral"]');
  referralNote.classList.toggle("refer", answer.refer);
  referralNote.append(paragraph(lead), list(reasons));
  content.querySelector(".bars").append(
    ...answer.probabilities.map((value, grade) => bar(gradeName(model, grade), value, grade === answer.grade)),
  );
  const others = Object.entries(answer.other_symptoms ?? {});
  const section = content.querySelector(".others");
  section.hidden = !others.length;
  section.querySelector("ul").append(...others.map(([name, other]) => otherSymptom(name, other, model)));
  return content;
}

function otherSymptom(name, { grade, probabilities }, model) {
  return fill("other", {
    name: say(`symptom.${name}`),
    grade: gradeName(model, grade),
    percent: percent(probabilities[grade], 0),
  });
}

function gradeSet(grades, model) {
  const [low, high] = [gradeName(model, grades[0]), gradeName(model, grades.at(-1))];
  return say(grades.length > 1 ? "set.range" : "set.alone", { low, high });
}

function referral(answer) {
  return answer.refer ? [say("refer"), ...reasonWords(answer.refer_reasons)] : [say("no-refer")];
}

function paragraph(text) {
  const node = document.createElement("p");
  node.textContent = text;
  return node;
}

function list(texts) {
  const node = document.createElement("ul");
  node.hidden = !texts.length;
  for (const text of texts) node.append(Object.assign(document.createElement("li"), { textContent: text }));
  return node;
}

function bar(name, probability, isLikeliest) {
  const row = fill("bar", { name, percent: percent(probability, 1) });
  row.querySelector(".fill").style.width = `${100 * probability}%`;
  row.querySelector("li").classList.toggle("likeliest", isLikeliest);
  return row;
}
