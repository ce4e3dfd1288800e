/** Requests of the review to its server, and the pictures that it has loaded. */

const KEPT = 6;  // pictures in memory: the ones around the current one

/** Fetches a path; posts `body` as JSON if there is one. Throws `{code, detail}`. */
async function request(path, body) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : post);
  } catch {
    throw { code: "no_answer" };
  }
  if (!response.ok) throw await response.json().catch(() => ({ code: "failed" }));
  return response;
}

export async function call(path, body) {
  return (await request(path, body)).json();
}

/** Fetches a picture; returns its blob URL, which the caller revokes. */
export async function fetchPicture(path) {
  return URL.createObjectURL(await (await request(path)).blob());
}

const pictures = new Map();  // image id -> promise of a blob URL

/** Returns a promise of the URL of a picture, which is loaded once. */
export function picture(id) {
  if (!pictures.has(id)) {
    const loaded = fetchPicture(`/images/${id}/picture`);
    pictures.set(id, loaded);
    loaded.catch(() => pictures.delete(id));  // the next visit tries again
    for (const [oldest, url] of pictures) {
      if (pictures.size <= KEPT) break;
      pictures.delete(oldest);
      url.then(URL.revokeObjectURL, () => {});
    }
  }
  return pictures.get(id);
}
