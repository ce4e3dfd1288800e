/** Photos of this page and their grading: a few concurrent requests, each graded or failed with a reason. */

import { Problem, call } from "./api.js";

const AT_ONCE = 3;
const MAX_BYTES = 32 * 2 ** 20;  // the server's limit; checked here to save the upload

/** Photos in order of arrival; see `photographOf` for their fields. */
export const photographs = [];

/** Events: `changed` and `removed` with a photo, `idle` with the photos that were settled since the last `idle`. */
export const events = new EventTarget();

let running = 0;
let settled = [];
let known;

function fire(kind, detail) {
  events.dispatchEvent(new CustomEvent(kind, { detail }));
}

function photographOf(file) {
  return {
    file,
    name: file.name,  // stays in the browser
    url: URL.createObjectURL(file),
    status: "waiting",  // then sending, then graded or failed
    wait: null,  // while the server is busy: {seconds, next, tries}
    answer: null,  // of POST /v1/grade, when graded
    model: null,  // of GET /v1/model, when graded
    problem: null,  // when failed
    heats: new Map(),  // heatmaps that were fetched, by grade
    controller: new AbortController(),
  };
}

/** Queues files; returns their photos. */
export function add(files) {
  const added = Array.from(files, photographOf);
  photographs.push(...added);
  for (const photograph of added) fire("changed", photograph);
  next();
  return added;
}

/** Queues failed photos again. */
export function retry(failed) {
  settled = settled.filter((each) => !failed.includes(each));
  for (const photograph of failed) {
    photograph.status = "waiting";
    photograph.problem = null;
    fire("changed", photograph);
  }
  next();
}

/** Removes a photo and aborts its request. */
export function remove(photograph) {
  photographs.splice(photographs.indexOf(photograph), 1);
  settled = settled.filter((each) => each !== photograph);
  photograph.controller.abort();
  URL.revokeObjectURL(photograph.url);
  fire("removed", photograph);
}

export const withStatus = (...statuses) => photographs.filter(({ status }) => statuses.includes(status));

/** Progress of the queued photos: {done, total}. */
export function progress() {
  return { done: settled.length, total: settled.length + withStatus("waiting", "sending").length };
}

/** The current model, or the model with a given version. */
export async function modelOf(version) {
  const model = await (known ??= fetchModel());
  if (!version || model.model_version === version) return model;
  return (known = fetchModel());  // the server has another bundle now
}

function fetchModel() {
  return call("/v1/model").catch((error) => {
    known = undefined;
    throw error;
  });
}

/** Requests the grade of a photo; `fields` are added to the form. */
export function send(photograph, fields, signal, onWait) {
  const body = new FormData();
  body.append("file", photograph.file, "photograph");
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  return call("/v1/grade", { body, signal, onWait });
}

function next() {
  for (const photograph of withStatus("waiting").slice(0, AT_ONCE - running)) {
    running += 1;
    grade(photograph).finally(() => {
      running -= 1;
      next();
    });
  }
  if (running === 0 && settled.length) {
    const batch = settled;
    settled = [];
    fire("idle", batch);
  }
}

async function grade(photograph) {
  const { signal } = photograph.controller;
  const onWait = (wait) => {
    photograph.wait = wait;
    fire("changed", photograph);
  };
  photograph.status = "sending";
  fire("changed", photograph);
  try {
    await check(photograph.file);
    photograph.answer = await send(photograph, {}, signal, onWait);
    photograph.model = await modelOf(photograph.answer.model_version);
    photograph.status = "graded";
  } catch (error) {
    photograph.problem = error;
    photograph.status = "failed";
  }
  if (signal.aborted) return;
  settled.push(photograph);
  fire("changed", photograph);
}

async function check(file) {
  if (file.size > MAX_BYTES) throw new Problem({ code: "too_many_bytes", detail: `${file.size} bytes` });
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch (error) {  // a folder, or a file that was removed
    throw new Problem({ code: "unreadable", detail: String(error) });
  }
}
