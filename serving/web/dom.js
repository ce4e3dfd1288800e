/** Small things that every part of the page does with the document. */

import { translate } from "./words.js";

export const element = (id) => document.getElementById(id);

/** A translated copy of a template, its slots filled with text. */
export function fill(template, slots = {}) {
  const copy = element(template).content.cloneNode(true);
  translate(copy);
  for (const [name, text] of Object.entries(slots)) {
    copy.querySelector(`[data-slot="${name}"]`).textContent = text;
  }
  return copy;
}

/** Shows a note with this text; hides it where there is none. */
export function note(id, text) {
  element(id).textContent = text;
  element(id).hidden = !text;
}

/** Tells those who listen to the page and do not see it. */
export function announce(text) {
  element("announcer").textContent = text;
}
