"use strict";

const REASONS = {
  ambiguous_grade: "more than one grade is plausible",
  low_confidence: "the likeliest grade is not likely enough",
  blurred: "it is blurred",
  too_dark: "it is too dark",
  too_bright: "it is too bright",
  unlike_training: "it is unlike the photographs that the model knows, so its grade means nothing",
};
const NOTES = {
  first_frame_only: "The file holds several pictures; only the first was graded.",
};

const element = (id) => document.getElementById(id);
const result = element("result");
const model = getJson("/v1/model");
let pending = new AbortController();

async function getJson(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw { code: "no_answer", detail: "The server does not answer. Try again in a moment." };
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  throw body ?? { code: `http_${response.status}`, detail: "The server failed. Try again in a moment." };
}

/** A copy of a template, its slots filled with text. */
function fill(template, slots) {
  const copy = element(template).content.cloneNode(true);
  for (const [name, text] of Object.entries(slots)) {
    copy.querySelector(`[data-slot="${name}"]`).textContent = text;
  }
  return copy;
}

function show(content, busy = false) {
  result.replaceChildren(content);
  result.setAttribute("aria-busy", String(busy));
}

function bar({ name, name_ko }, probability, likeliest) {
  const row = fill("bar", { name, "name-ko": name_ko, percent: `${(100 * probability).toFixed(1)} %` });
  row.querySelector(".fill").style.width = `${100 * probability}%`;
  row.querySelector("li").classList.toggle("likeliest", likeliest);
  return row;
}

function setNote(grades, coverage, names) {
  const low = names[grades[0]].name;
  const high = names[grades[grades.length - 1]].name;
  const range = grades.length > 1 ? `${low} to ${high}` : `${low} alone`;
  return `Grade set: ${range}. Sets like this hold the true grade in ${Math.round(100 * coverage)} % of validation photographs.`;
}

function referralNote(answer) {
  if (!answer.refer) return "No referral suggested.";
  const reasons = answer.refer_reasons.map((reason) => REASONS[reason] ?? reason).join(", and ");
  return `A person should look at this photograph: ${reasons}.`;
}

function fileNote(answer) {
  return answer.notes.map((note) => NOTES[note] ?? note).join(" ");
}

function graded(answer, { grades, conformal }) {
  const { name, name_ko } = grades[answer.grade];
  const content = fill("graded", {
    name,
    "name-ko": name_ko,
    grade: answer.grade,
    severity: answer.expected_severity.toFixed(2),
    set: setNote(answer.grade_set, conformal.coverage, grades),
    referral: referralNote(answer),
    file: fileNote(answer),
    image: answer.image_id,
  });
  content.querySelector('[data-slot="referral"]').classList.toggle("refer", answer.refer);
  content.querySelector(".bars").append(
    ...answer.probabilities.map((value, grade) => bar(grades[grade], value, grade === answer.grade)),
  );
  return content;
}

function preview(file) {
  const image = element("preview");
  URL.revokeObjectURL(image.src);
  image.onload = () => { image.hidden = false; };
  image.onerror = () => { image.hidden = true; };  // no picture, or TIFF, which browsers do not show
  image.src = URL.createObjectURL(file);
  element("choose").textContent = "Choose another photograph";
}

async function grade(file) {
  pending.abort();  // an older photograph's answer must not replace this one's
  const { signal } = (pending = new AbortController());
  preview(file);
  show(fill("busy", {}), true);
  const body = new FormData();
  body.append("file", file, "photograph");  // the file's own name stays here
  try {
    const answer = await getJson("/v1/grade", { method: "POST", body, signal });
    show(graded(answer, await model));
  } catch (error) {
    if (error.name === "AbortError") return;
    show(fill("failed", { detail: error.detail ?? String(error), code: error.code ?? "" }));
  }
}

element("file").addEventListener("change", ({ target }) => {
  if (target.files.length) grade(target.files[0]);
  target.value = "";  // so that the same file can be chosen again
});

// The whole page takes a drop: beside the field, the browser would leave the page for the file.
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) grade(event.dataTransfer.files[0]);
  });
}

model.then(
  ({ model_version, device, precision }) => {
    element("model").textContent = `Model ${model_version}, ${precision} on ${device}`;
  },
  ({ detail }) => { element("model").textContent = `Model unknown. ${detail}`; },
);
