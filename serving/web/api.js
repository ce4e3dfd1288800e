/** Requests to the endpoint: with the access key where it asks for one, again later where it is busy. */

const TRIES = 5;
const LONGEST_WAIT_S = 60;
const USUAL_WAIT_S = 2;
const KEY = "scalp.key";

/** Why a request has no answer; `code` and `detail` as in the server's problem. */
export class Problem extends Error {
  constructor({ code, detail }) {
    super(detail);
    this.code = code;
    this.detail = detail;
  }
}

let key = remembered();
let asked = null;
let ask = null;

function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Names the function that asks the person for the key: it takes the server's problem and promises the key. */
export function askWith(question) {
  ask = question;
}

/**
 * The answer to a request, as JSON.
 *
 * @param path of the endpoint.
 * @param body form to post; without one it is a GET.
 * @param signal ends the request.
 * @param onWait told `{seconds, next, tries}` before each wait for a busy server, and null after it.
 * @throws Problem, or the signal's reason.
 */
export async function call(path, { body, signal, onWait = () => {} } = {}) {
  for (let attempt = 1; ; ) {
    const used = key;
    const response = await send(path, body, used, signal);
    const answer = await response.json().catch(() => null);
    if (response.ok && answer) return answer;
    const problem = new Problem(answer ?? { code: `http_${response.status}` });
    if (response.status === 401) {
      await anotherKeyThan(used, problem);
      signal?.throwIfAborted();
    } else if ([429, 503].includes(response.status) && attempt < TRIES) {
      const seconds = secondsToWait(response);
      onWait({ seconds, next: ++attempt, tries: TRIES });
      await sleep(seconds, signal);
      onWait(null);
    } else {
      throw problem;
    }
  }
}

async function send(path, body, used, signal) {
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
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

/** Waits for a key other than the one that was refused; whoever needs one at the same time waits for the same. */
async function anotherKeyThan(used, problem) {
  if (key !== used) return;
  asked ??= ask(problem);
  key = await asked;
  asked = null;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // It holds until the page is left.
  }
}
