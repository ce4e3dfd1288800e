/** Requests of the review to its server, and the pictures that it has loaded. */

import { request } from "./api.js";

const REVIEW = "/v1/review";
const KEPT = 6;  // pictures in memory: the ones around the current one

/** Fetches a path of the review as JSON; posts `json` if there is one. Throws a Problem. */
export async function call(path, json) {
  // A refused answer is reported immediately, unless the limit of requests refused it unread.
  const options = json === undefined ? {} : { json, busy: [429] };
  return (await request(`${REVIEW}${path}`, options)).json();
}

/** Fetches a picture; returns its blob URL, which the caller revokes. */
export async function fetchPicture(path) {
  return URL.createObjectURL(await (await request(`${REVIEW}${path}`)).blob());
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
