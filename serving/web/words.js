/** What the page says, in English or Korean. */

import { ENGLISH } from "./english.js";
import { KOREAN } from "./korean.js";

const TABLES = { en: ENGLISH, ko: KOREAN };
const REMEMBERED = "scalp.language";

export let language = remembered() ?? (navigator.language.startsWith("ko") ? "ko" : "en");

function remembered() {
  try {
    const code = localStorage.getItem(REMEMBERED);
    return code in TABLES ? code : undefined;
  } catch {
    return undefined;  // the browser keeps nothing for this page
  }
}

export function setLanguage(code) {
  language = code;
  try {
    localStorage.setItem(REMEMBERED, code);
  } catch {
    // It holds until the page is left.
  }
}

/** The words of a key, `{name}` replaced by its value; `key.one` for a `count` of one. Undefined where there are none. */
export function words(key, values = {}) {
  const table = TABLES[language];
  const text = (values.count === 1 && table[`${key}.one`]) || table[key];
  return text?.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** As `words`, where the key is known to be there. */
export function say(key, values) {
  return words(key, values) ?? key;
}

/** Puts the words into the elements that name a key in `data-say`, and into labels that name one in `data-label`. */
export function translate(root) {
  for (const each of root.querySelectorAll("[data-say]")) each.textContent = say(each.dataset.say);
  for (const each of root.querySelectorAll("[data-label]")) each.setAttribute("aria-label", say(each.dataset.label));
}

export function percent(share, digits) {
  const options = { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits };
  return new Intl.NumberFormat(language, options).format(share);
}

/** Name of a grade of the model, 0 to 3. */
export function gradeName(model, grade) {
  const { name, name_ko } = model.grades[grade];
  return language === "ko" ? name_ko : name;
}

/** A problem in words: by its code; a code that this page does not know, in the server's. */
export function problemWords({ code, detail }) {
  return words(`problem.${code}`) ?? detail ?? say("problem.failed");
}

/** Everything that speaks for a person's look at a photograph, in words. */
export function reasonWords(reasons) {
  return reasons.map((reason) => words(`reason.${reason}`) ?? reason);
}
