/** Entry point of the review: the current photo, the answer of the reader, keys. */

import { offerAids, showAids, toggleAid } from "./aids.js";
import { answerName, answerOf, makeButtons, showAnswer, showModel, showOthers } from "./answers.js";
import { forgetKey, hasKey, rememberKey, setKeyPrompt } from "./api.js";
import { announce, element, note } from "./dom.js";
import { askForKey } from "./key_form.js";
import { call, picture } from "./requests.js";
import "./review_words.js";
import { language, problemWords, say, setLanguage, translate } from "./words.js";

const AID_KEYS = { h: "heatmap", s: "neighbors" };

const comment = element("comment");
const drafts = new Map();  // image id -> comment that is not saved

let review = null;
let shown = null;  // the current image
let isReady = false;  // whether its picture is visible: an unseen photo cannot be answered
let saving = null;  // promise of the request that saves an answer
let moving = Promise.resolve();  // moves by keys follow each other
let saved = null;  // the last saved answer
let visits = 0;

// --- what is shown -------------------------------------------------------------------------------------------

function speak() {
  document.documentElement.lang = language;
  document.title = say("review.title");
  translate(document);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  if (!review) return;
  element("done-title").textContent = say(review.images ? "review.done" : "review.none");
  element("again").hidden = !review.images;
  element("change-reader").hidden = !hasKey();
  element("reader").textContent = say(review.adjudicate ? "review.reader.deciding" : "review.reader", review);
  makeButtons(review, save);
  showProgress();
  if (shown) showImage();
}

function showProgress() {
  const { images, left } = review;
  element("progress-text").textContent = say("review.progress", { done: images - left, images });
  Object.assign(element("progress-bar"), { max: images || 1, value: images - left });
}

function showImage() {
  const { place, images, previous, next, answer, answers, model } = shown;
  const values = { place, images };
  element("place").textContent = say("review.place", values);
  element("picture").alt = say("review.alt", values);
  element("previous").disabled = !previous;
  element("next").disabled = !next;
  showAnswer(answer, isReady);
  showOthers(review, answers);
  showModel(review, model);
  showAids();
  note("saved", saved ? say("review.saved", { answer: answerName(review, saved) }) : "");
}

/** Shows an image; its picture follows. */
async function visit(id) {
  keepDraft();
  const wasReady = isReady;
  isReady = false;
  const turn = ++visits;
  try {
    const image = await call(`/images/${id}`);
    if (turn !== visits) return;
    shown = image;
  } catch (error) {
    isReady = wasReady;
    note(element("review").hidden ? "failed" : "problem", problemWords(error));
    return;
  }
  note("failed", "");
  element("review").hidden = false;
  element("done").hidden = true;
  note("problem", "");
  comment.value = drafts.get(id) ?? shown.answer?.comment ?? "";
  element("picture").removeAttribute("src");
  offerAids(review, shown);
  showImage();
  showPicture(id);
}

async function showPicture(id) {
  note("picture-problem", "");
  element("frame").hidden = false;
  try {
    const url = await picture(id);
    if (shown.image_id !== id) return;
    element("picture").src = url;
    await element("picture").decode();
    if (shown.image_id !== id) return;
    const { naturalWidth, naturalHeight } = element("picture");
    element("frame").style.setProperty("--ratio", naturalWidth / naturalHeight);
    isReady = true;
    const place = say("review.place", shown);
    announce(`${element("saved").textContent} ${place}`);
  } catch (error) {
    if (shown.image_id !== id) return;
    element("frame").hidden = true;
    note("picture-problem", say("review.not-shown", { reason: problemWords(error) }));
  }
  showAnswer(shown.answer, isReady);
  if (shown.next) picture(shown.next).catch(() => {});  // loaded ahead
}

function showDone() {
  element("review").hidden = true;
  element("done").hidden = false;
  element("done-title").focus();
}

/** Moves to the "previous" or "next" image. */
function move(direction) {
  moving = moving.then(async () => {
    await saving;
    if (!shown[direction]) return;
    saved = null;
    await visit(shown[direction]);
  });
}

// --- the answer ------------------------------------------------------------------------------------------------

/** Saves an answer, then shows the next image; says "saved" after the server has said so. */
async function save(answer) {
  const image = shown;
  await saving;
  if (!isReady || shown !== image) return;  // the answer is to the photo that was seen
  saving = send(answer);
  if (!await saving) return;
  const following = image.next ?? review.first_open;
  if (following) await visit(following);
  else showDone();
}

async function send(answer) {
  const image = shown;
  note("problem", "");
  try {
    const text = comment.value.trim();
    const progress = await call(`/images/${image.image_id}/answer`, { ...answer, comment: text || null });
    image.answer = saved = progress.answer;
    Object.assign(review, { left: progress.left, first_open: progress.first_open });
    showProgress();
    showImage();
    return true;
  } catch (error) {
    note("problem", say("review.not-saved", { reason: problemWords(error) }));
    return false;
  }
}

function isChanged() {
  return shown && comment.value.trim() !== (shown.answer?.comment ?? "");
}

/** Keeps a comment whose image has no answer yet, so that the way to another image does not lose it. */
function keepDraft() {
  if (isChanged()) drafts.set(shown.image_id, comment.value);
  else if (shown) drafts.delete(shown.image_id);
}

comment.addEventListener("change", () => {
  const { grade, reason } = shown.answer ?? {};
  if (isChanged() && shown.answer && isReady) saving = send(reason ? { reason } : { grade });
});

addEventListener("beforeunload", (event) => {
  keepDraft();
  if (drafts.size) event.preventDefault();
});

// --- controls ----------------------------------------------------------------------------------------------------

/** Shows or hides an aid; as with an answer, the photo must be visible. */
function askFor(aid) {
  if (isReady) toggleAid(aid);
}

/** Key of an event; with a Korean layout, the Latin letter of its place. */
function keyOf({ key, code }) {
  return /^[\x20-\x7e]$|^Arrow/.test(key) ? key.toLowerCase() : code.replace(/^Key/, "").toLowerCase();
}

document.addEventListener("keydown", (event) => {
  if (!shown || element("review").hidden || !element("key").hidden) return;
  if (event.target === comment) {
    if (event.key === "Escape") comment.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = keyOf(event);
  const answer = answerOf(key);
  if (answer) save(answer);
  else if (key === "arrowleft") move("previous");
  else if (key === "arrowright") move("next");
  else if (key === "c") comment.focus();
  else if (key in AID_KEYS) askFor(AID_KEYS[key]);
  else return;
  event.preventDefault();
});

element("previous").addEventListener("click", () => move("previous"));
element("next").addEventListener("click", () => move("next"));
for (const aid of Object.values(AID_KEYS)) element(`${aid}-toggle`).addEventListener("click", () => askFor(aid));
element("again").addEventListener("click", () => visit(review.first));

setKeyPrompt(async (problem) => {
  const key = await askForKey(problem);
  if (!review) return key;
  // An answer of one reader must not be sent with the key of another: the page begins again.
  rememberKey(key);
  location.reload();
  return new Promise(() => {});
});
element("change-reader").addEventListener("click", () => {
  forgetKey();
  location.reload();
});

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    setLanguage(button.dataset.language);
    speak();
  });
}

speak();
try {
  review = await call("");
  speak();
  const first = review.first_open ?? (review.answered_too && review.first);
  if (first) await visit(first);
  else showDone();
} catch (error) {
  note("failed", problemWords(error));
}
