/** Texts of the page in English or Korean. */

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
    return undefined;  // the browser denies storage to this page
  }
}

export function setLanguage(code) {
  language = code;
  try {
    localStorage.setItem(REMEMBERED, code);
  } catch {
    // The choice is kept until the page is left.
  }
}

/** Text of a key with its values; `key.one` for a `count` of one. Undefined for an unknown key. */
export function words(key, values = {}) {
  const table = TABLES[language];
  const text = (values.count === 1 && table[`${key}.one`]) || table[key];
  return text?.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** As `words`, for a key that exists. */
export function say(key, values) {
  return words(key, values) ?? key;
}

/** Sets the texts of elements with `data-say`, and the labels of elements with `data-label`. */
export function translate(root) {
  for (const node of root.querySelectorAll("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of root.querySelectorAll("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
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

/** Text of a problem by its code; the server's detail for an unknown code. */
export function problemWords({ code, detail }) {
  return words(`problem.${code}`) ?? detail ?? say("problem.failed");
}

/** Texts of the reasons for a referral. */
export function reasonWords(reasons) {
  return reasons.map((reason) => words(`reason.${reason}`) ?? reason);
}
