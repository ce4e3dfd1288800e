/** The form that prompts for the access key. */

import { element } from "./dom.js";
import { say } from "./words.js";

const REASONS = { wrong_key: "key.wrong", expired_key: "key.expired", forbidden: "key.forbidden" };

/** Shows the form with the server's problem; returns a promise of the key that is entered. */
export function askForKey({ code }) {
  const form = element("key");
  form.hidden = false;
  const problem = element("key-problem");
  problem.hidden = !(code in REASONS);
  problem.dataset.say = REASONS[code] ?? "key.wrong";
  problem.textContent = say(problem.dataset.say);
  element("key-field").focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      form.hidden = true;
      resolve(element("key-field").value);
      form.reset();
    };
  });
}
