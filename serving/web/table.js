/** CSV export of the results: the columns of a bulk result, one row per photo. */

const PROBABILITIES = [0, 1, 2, 3];
const PLAIN = ["image_id", "sha256", "grade", "grade_name", "expected_severity", "unlikeness", "refer"];
const LISTS = ["grade_set", "refer_reasons", "notes"];

/** CSV text of one or more settled photos, with their local file names. */
export function csv(photographs) {
  const symptoms = [...new Set(photographs.flatMap(({ answer }) => Object.keys(answer?.other_symptoms ?? {})))];
  const rows = photographs.map((photograph) => row(photograph, symptoms));
  return [Object.keys(rows[0]), ...rows.map(Object.values)].map(line).join("");
}

function row({ name, status, answer, problem }, symptoms) {
  return {
    file: name,
    status,
    error_code: problem?.code,
    error: problem?.detail,
    ...Object.fromEntries(PLAIN.map((column) => [column, answer?.[column]])),
    ...Object.fromEntries(PROBABILITIES.map((grade) => [`probability_${grade}`, answer?.probabilities[grade]])),
    ...Object.fromEntries(LISTS.map((column) => [column, answer?.[column].join(" ")])),
    ...Object.fromEntries(symptoms.map((symptom) => [`${symptom}_grade`, answer?.other_symptoms?.[symptom]?.grade])),
    model_version: answer?.model_version,
    graded_at: answer?.graded_at,
  };
}

function line(values) {
  return `${values.map(field).join(",")}\r\n`;
}

function field(value) {
  let text = String(value ?? "");
  if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;  // a spreadsheet must not evaluate a file name as a formula
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Offers a text as a file download. */
export function save(text, name) {
  // With a byte order mark spreadsheets detect UTF-8, which Korean names need.
  const url = URL.createObjectURL(new Blob(["\ufeff", text], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
