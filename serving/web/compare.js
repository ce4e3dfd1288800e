/** Comparison of two graded photos, before and after. */

import { announce, element } from "./dom.js";
import { events, photographs, withStatus } from "./grading.js";
import { gradeName, say } from "./words.js";

const SAME = 0.05;  // smallest reported difference of the expected severity
const SIDES = ["before", "after"];

const section = element("compare");
const pair = element("pair");
const choices = SIDES.map(element);
const views = section.querySelectorAll("[aria-pressed]");
const wipe = element("wipe");

let shown = [];  // the two photos

export function setUp() {
  for (const choice of choices) {
    choice.addEventListener("change", () => choose(choices.map(({ value }) => photographs[value])));
  }
  element("swap").addEventListener("click", () => choose(shown.toReversed()));
  element("compare-close").addEventListener("click", () => {
    section.hidden = true;
    element("compare-two").focus();
  });
  for (const button of views) button.addEventListener("click", () => setView(button.dataset.view));
  wipe.addEventListener("input", () => pair.style.setProperty("--wipe", `${wipe.value}%`));
  for (const kind of ["idle", "removed"]) events.addEventListener(kind, refresh);
}

/** Opens the comparison; `last` is the photo after. */
export function open(last = withStatus("graded").at(-1)) {
  section.hidden = false;
  choose([withStatus("graded").find((each) => each !== last), last]);
  element("compare-title").focus();
}

/** Updates the comparison after a change of the photos or the language. */
export function refresh() {
  if (section.hidden) return;
  const graded = withStatus("graded");
  section.hidden = graded.length < 2;
  if (section.hidden) return;
  const left = shown.filter((each) => graded.includes(each));
  const others = graded.filter((each) => !left.includes(each));
  show(shown.map((each) => (left.includes(each) ? each : others.pop())));
}

function setView(view) {
  pair.dataset.view = view;
  for (const button of views) button.setAttribute("aria-pressed", String(button.dataset.view === view));
}

function choose(two) {
  show(two);
  const [before, after] = shown.map(nameOf);
  announce(say("compared", { before, after, change: change(...shown)[0] }));
}

function show(two) {
  shown = two;
  SIDES.forEach((side, index) => showSide(side, shown[index]));
  element("change").replaceChildren(
    ...change(...shown).map((text) => Object.assign(document.createElement("p"), { textContent: text })),
  );
}

function showSide(side, photograph) {
  const image = element(`${side}-image`);
  if (image.src !== photograph.url) image.src = photograph.url;
  image.alt = `${say(side)}: ${say("photograph-alt", { name: photograph.name })}`;
  element(`${side}-grade`).textContent = nameOf(photograph);
  const graded = [...photographs.entries()].filter(([, { status }]) => status === "graded");
  element(side).replaceChildren(
    ...graded.map(([index, each]) => new Option(`${index + 1}. ${each.name} (${nameOf(each)})`, index)),
  );
  element(side).value = photographs.indexOf(photograph);
}

const nameOf = ({ model, answer }) => gradeName(model, answer.grade);

function change(before, after) {
  const [from, to] = [before.answer.expected_severity, after.answer.expected_severity];
  const difference = to - from;
  const kind = Math.abs(difference) < SAME ? "same" : difference > 0 ? "more" : "less";
  const figures = { before: from.toFixed(2), after: to.toFixed(2), change: Math.abs(difference).toFixed(2) };
  const overlap = before.answer.grade_set.some((grade) => after.answer.grade_set.includes(grade));
  const lines = [say(`change.${kind}`, figures), say(overlap ? "change.overlap" : "change.apart")];
  const referred = SIDES.filter((_, index) => [before, after][index].answer.refer);
  if (referred.length) lines.push(say("change.refer", { which: referred.map((side) => say(side)).join(", ") }));
  if (before.answer.model_version !== after.answer.model_version) lines.push(say("change.models"));
  return lines;
}
