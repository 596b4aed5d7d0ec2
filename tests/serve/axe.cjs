// SPDX-License-Identifier: Apache-2.0
// axe-core over the page of a running `vtclip serve`; not part of the tests, as it needs npm:
//   npm install --prefix /tmp/axe puppeteer-core axe-core
//   NODE_PATH=/tmp/axe/node_modules node tests/serve/axe.cjs http://127.0.0.1:8000/ IMAGE...
"use strict";
const fs = require("node:fs");
const puppeteer = require("puppeteer-core");

const [url, ...images] = process.argv.slice(2);
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

async function check(page, name) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run());
  for (const one of violations) console.log(`${name}: ${one.id}: ${one.nodes.map((n) => n.html).join(" ")}`);
  return violations.length;
}

(async () => {
  const executablePath = process.env.CHROMIUM || "/usr/bin/chromium";
  const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  let found = 0;
  for (const width of [1200, 390]) {
    for (const value of ["light", "dark"]) {
      const page = await browser.newPage();
      await page.setBypassCSP(true); // for axe alone
      await page.setViewport({ width, height: 800 });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value }]);
      await page.goto(url);
      await page.waitForSelector("#classes li");
      await (await page.$("#files")).uploadFile(...images);
      await page.waitForFunction(() => /classified/.test(document.getElementById("status").textContent));
      for (const button of await page.$$(".more")) await button.click();
      await page.waitForFunction(() => !/Working/.test(document.getElementById("results").textContent));
      found += await check(page, `page, ${width}, ${value}`);
      await page.goto(new URL("/docs", url));
      found += await check(page, `docs, ${width}, ${value}`);
      await page.close();
    }
  }
  await browser.close();
  console.log(`${found} violations`);
  process.exit(found ? 1 : 0);
})();
