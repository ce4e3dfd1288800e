/** How answers are shown: the buttons, the answer of the model, those of the readers. */

import { element, fill } from "./dom.js";
import { gradeName, percent, reasonWords, say } from "./words.js";

const REASON_KEYS = { cannot_be_graded: "u", not_a_scalp: "n" };

/** Makes the buttons of grades and reasons; `choose` gets the answer of a pressed one. */
export function makeButtons(review, choose) {
  const grades = review.grades.map(({ grade }) => button({ grade }, String(grade), review, choose));
  const reasons = Object.entries(REASON_KEYS).map(([reason, key]) => button({ reason }, key, review, choose));
  element("grades").replaceChildren(...grades);
  element("reasons").replaceChildren(...reasons);
}

function button(answer, key, review, choose) {
  const node = fill("answer", { key, name: answerName(review, answer) }).firstElementChild;
  if (answer.grade !== undefined) node.dataset.grade = answer.grade;
  else node.dataset.reason = answer.reason;
  node.setAttribute("aria-keyshortcuts", key);
  node.addEventListener("click", () => choose(answer));
  return node;
}

/** Marks the button of the reader's answer, and whether buttons may be pressed; they keep the focus. */
export function showAnswer(answer, isReady) {
  for (const node of document.querySelectorAll(".answer")) {
    const { grade, reason } = node.dataset;
    const isChosen = answer && (reason === undefined ? grade === String(answer.grade) : reason === answer.reason);
    node.setAttribute("aria-pressed", String(Boolean(isChosen)));
    node.setAttribute("aria-disabled", String(!isReady));
  }
}

/** Answer of a key; undefined for other keys. */
export function answerOf(key) {
  if (/^[0-3]$/.test(key)) return { grade: Number(key) };
  const reason = Object.keys(REASON_KEYS).find((name) => REASON_KEYS[name] === key);
  return reason && { reason };
}

export function answerName(review, { grade, reason }) {
  return reason ? say(`review.reason.${reason}`) : gradeName(review, grade);
}

/** Shows the answers of the readers; null hides them. */
export function showOthers(review, answers) {
  element("others").hidden = !answers;
  const lines = (answers ?? []).map((answer) => {
    const name = `${answer.grade ?? ""} ${answerName(review, answer)}`.trim();
    return item(answer.comment ? `${name}: ${answer.comment}` : name);
  });
  element("others-list").replaceChildren(...lines);
}

/** Shows the answer of the model; null hides it. */
export function showModel(review, model) {
  element("model").hidden = !model;
  element("model-answer").replaceChildren(...(model ? [graded(review, model)] : []));
}

function graded(review, model) {
  const { grade, probabilities, grade_set: set, expected_severity: severity } = model;
  const names = [set[0], set.at(-1)].map((one) => gradeName(review, one));
  const content = fill("model-graded", {
    name: gradeName(review, grade),
    severity: say("severity", { grade, severity: severity.toFixed(2) }),
    set: say(set.length > 1 ? "set.range" : "set.alone", { low: names[0], high: names[1] }),
    version: say("review.version", { version: model.model_version }),
  });
  content.querySelector(".bars").append(...probabilities.map((value, index) => {
    const row = fill("bar", { name: gradeName(review, index), percent: percent(value, 1) });
    row.querySelector(".fill").style.width = `${100 * value}%`;
    row.querySelector("li").classList.toggle("likeliest", index === grade);
    return row;
  }));
  content.querySelector(".why").append(...reasonWords(model.refer_reasons).map(item));
  return content;
}

function item(text) {
  return Object.assign(document.createElement("li"), { textContent: text });
}
