/** Drives the page in Chromium as one JSON document on standard input says, and answers with another. */

import fs from "node:fs";
import { chromium } from "playwright-core";

const asked = JSON.parse(fs.readFileSync(0, "utf8"));
const browser = await chromium.launch({ executablePath: asked.chromium, headless: true, args: asked.flags });
const page = await browser.newPage({ viewport: { width: 1280, height: 800 } });
const seen = { errors: [], outside: [], runs: [], shots: [] };
page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
page.on("pageerror", (error) => seen.errors.push(error.message));
page.on("request", (request) => {
  const url = request.url();
  if (!url.startsWith(asked.url) && !url.startsWith(`blob:${asked.url}`)) seen.outside.push(url);
});

const visibleError = () => page.$eval("#error", (error) => (error.hidden ? null : error.textContent));
const loaded = async () => {
  await page.waitForFunction(() => !document.querySelector("#run").disabled || !document.querySelector("#error").hidden);
  return visibleError();
};

page.setDefaultTimeout(asked.timeout_ms);
await page.goto(asked.url);
seen.error = await loaded();
await page.evaluate(() => {
  const answer = document.querySelector("#answer");
  globalThis.lengths = [];
  new MutationObserver(() => globalThis.lengths.push(answer.textContent.length)).observe(answer, { childList: true });
});
if (asked.backend === "webgpu") {
  if (await page.isDisabled("input[value=webgpu]")) seen.unavailable = await page.textContent("#webgpu-note");
  else {
    await page.check("input[value=webgpu]");
    seen.error = await loaded();
  }
}
for (const run of seen.error || seen.unavailable ? [] : asked.runs) {
  if (run.chat !== undefined) await page.setChecked("#chat", run.chat);
  await page.fill("#prompt", run.prompt);
  await page.fill("#max-new-tokens", String(run.tokens));
  await page.evaluate(() => (globalThis.lengths.length = 0));
  await page.focus("#prompt");
  await page.keyboard.press("Control+Enter");
  for (;;) {
    const [length, tokens, failed] = await page.evaluate(() => {
      const answer = document.querySelector("#answer");
      return [answer.textContent.length, answer.dataset.tokens, !document.querySelector("#error").hidden];
    });
    if (run.stop && length > 0) await page.click("#stop", { force: true, timeout: 1000 }).catch(() => {});
    if (tokens !== undefined || failed) break;
    await page.waitForTimeout(5);
  }
  seen.runs.push({
    lengths: await page.evaluate(() => [...new Set(globalThis.lengths)]),
    text: await page.textContent("#answer"),
    tokens: ((await page.getAttribute("#answer", "data-tokens")) ?? "").split(",").filter(Boolean).map(Number),
    reason: await page.textContent("#reason"),
    figures: await page.innerText("#figures"),
    caption: await page.textContent("#caption"),
    error: await visibleError(),
  });
}
for (const [name, width, height] of [["desktop", 1280, 800], ["phone", 390, 844]]) {
  for (const colorScheme of asked.shots ? ["light", "dark"] : []) {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize({ width, height });
    await page.waitForTimeout(150);
    await page.screenshot({ path: `${asked.shots}-${name}-${colorScheme}.png`, fullPage: name === "phone" });
    seen.shots.push(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
  }
}
await browser.close();
process.stdout.write(JSON.stringify(seen));
