/** The results as a table for spreadsheets, made in the browser: the columns of a bulk result, one row a photograph. */

const PROBABILITIES = [0, 1, 2, 3];
const PLAIN = ["image_id", "sha256", "grade", "grade_name", "expected_severity", "unlikeness", "refer"];
const LISTS = ["grade_set", "refer_reasons", "notes"];

/** CSV text of settled photographs, one at least; the file names are those on the person's own device. */
export function csv(photographs) {
  const rows = photographs.map(row);
  return [Object.keys(rows[0]), ...rows.map(Object.values)].map(line).join("");
}

function row({ name, status, answer, problem }) {
  return {
    file: name,
    status,
    error_code: problem?.code,
    error: problem?.detail,
    ...Object.fromEntries(PLAIN.map((column) => [column, answer?.[column]])),
    ...Object.fromEntries(PROBABILITIES.map((grade) => [`probability_${grade}`, answer?.probabilities[grade]])),
    ...Object.fromEntries(LISTS.map((column) => [column, answer?.[column].join(" ")])),
    model_version: answer?.model_version,
    graded_at: answer?.graded_at,
  };
}

function line(values) {
  return `${values.map(field).join(",")}\r\n`;
}

function field(value) {
  let text = String(value ?? "");
  if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;  // a file's name must not become a spreadsheet's formula
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Hands a text to the browser as a file to save. */
export function save(text, name) {
  // Spreadsheets take the mark at the start for UTF-8; without it, Korean names come out wrong.
  const url = URL.createObjectURL(new Blob(["\ufeff", text], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
