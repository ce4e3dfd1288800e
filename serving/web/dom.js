/** Helpers for the document. */

import { translate } from "./words.js";

export const element = (id) => document.getElementById(id);

/** Makes a translated copy of a template with filled slots. */
export function fill(template, slots = {}) {
  const copy = element(template).content.cloneNode(true);
  translate(copy);
  for (const [name, text] of Object.entries(slots)) {
    copy.querySelector(`[data-slot="${name}"]`).textContent = text;
  }
  return copy;
}

/** Shows a note with this text; hides it if the text is empty. */
export function note(id, text) {
  element(id).textContent = text;
  element(id).hidden = !text;
}

/** Announces a text to screen readers. */
export function announce(text) {
  element("announcer").textContent = text;
}
