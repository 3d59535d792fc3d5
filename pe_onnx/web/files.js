/** Files of the site, fetched with progress. */

/**
 * The bytes of a file, and how many have come so far.
 *
 * @param {string} path relative to the page
 * @param {number} bytes its size, as the site's record says
 * @param {(bytes: number) => void} arrived called with the bytes of each piece
 * @returns {Promise<Uint8Array>}
 */
export async function fetchBytes(path, bytes, arrived) {
  const response = await answer(path);
  const whole = new Uint8Array(bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) throw new Error(`${path} is longer than ${bytes} bytes: make the site again`);
    whole.set(value, at);
    at += value.length;
    arrived(value.length);
  }
  if (at < bytes) throw new Error(`${path} ended after ${at} of ${bytes} bytes: load the page again`);
  return whole;
}

/**
 * @param {string} path relative to the page
 * @returns {Promise<any>} the parsed JSON
 */
export async function fetchJson(path) {
  return (await answer(path)).json();
}

async function answer(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path} cannot be loaded: ${response.status} ${response.statusText}`);
  return response;
}
