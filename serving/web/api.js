/** Requests to the endpoint, with the access key, and with retries while it is busy. */

const TRIES = 5;
const LONGEST_WAIT_S = 60;
const USUAL_WAIT_S = 2;
const KEY = "scalp.key";

/** Error of a request; `code` and `detail` are those of the server's problem. */
export class Problem extends Error {
  constructor({ code, detail }) {
    super(detail);
    this.code = code;
    this.detail = detail;
  }
}

let key = remembered();
let pendingKey = null;
let promptForKey = null;

function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Sets the function that prompts for the key: it takes the server's problem and returns a promise of the key. */
export function setKeyPrompt(prompt) {
  promptForKey = prompt;
}

/** As `request`; returns the response as JSON. */
export async function call(path, options) {
  const response = await request(path, options);
  const answer = await response.json().catch(() => null);
  if (!answer) throw failed(response);
  return answer;
}

/**
 * Sends a request and returns its response.
 *
 * @param path Path of the route.
 * @param body Form to post.
 * @param json Value to post; without it and a form the request is a GET.
 * @param signal AbortSignal of the request.
 * @param busy Statuses after which the request is sent again.
 * @param onWait Called with `{seconds, next, tries}` before each wait for a busy server, and with null after it.
 * @throws Problem, or the signal's reason.
 */
export async function request(path, { body, json, signal, busy = [429, 503], onWait = () => {} } = {}) {
  for (let attempt = 1; ; ) {
    const used = key;
    const response = await send(path, body, json, used, signal);
    if (response.ok) return response;
    const answer = await response.json().catch(() => null);
    const problem = answer ? new Problem(answer) : failed(response);
    if (response.status === 401 || problem.code === "forbidden") {
      await replaceKey(used, problem);
      signal?.throwIfAborted();
    } else if (busy.includes(response.status) && attempt < TRIES) {
      const seconds = secondsToWait(response);
      onWait({ seconds, next: ++attempt, tries: TRIES });
      await sleep(seconds, signal);
      onWait(null);
    } else {
      throw problem;
    }
  }
}

function failed(response) {
  return new Problem({ code: `http_${response.status}` });
}

async function send(path, form, json, used, signal) {
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const body = json === undefined ? form : JSON.stringify(json);
  try {
    return await fetch(path, { method: body ? "POST" : "GET", body, headers, signal });
  } catch (error) {
    signal?.throwIfAborted();
    throw new Problem({ code: "no_answer", detail: String(error) });
  }
}

function secondsToWait(response) {
  const seconds = Number(response.headers.get("Retry-After") ?? USUAL_WAIT_S);
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 1), LONGEST_WAIT_S) : USUAL_WAIT_S;
}

function sleep(seconds, signal) {
  signal?.throwIfAborted();
  return new Promise((resolve, reject) => {
    setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => reject(signal.reason));
  });
}

/** Prompts for a key to replace the refused one; concurrent requests share the prompt. */
async function replaceKey(used, problem) {
  if (key !== used) return;
  pendingKey ??= promptForKey(problem);
  key = await pendingKey;
  pendingKey = null;
  rememberKey(key);
}

/** Keeps a key in this tab until it is closed. */
export function rememberKey(word) {
  try {
    sessionStorage.setItem(KEY, word);
  } catch {
    // The key is kept until the page is left.
  }
}

/** Removes the key from this tab; the page has it until it is left. */
export function forgetKey() {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // It was not kept.
  }
}

export const hasKey = () => Boolean(key);
