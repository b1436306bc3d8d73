"""What every report's page holds, whatever the results: its style, its script, and the window of a picture."""

from __future__ import annotations

__all__ = ["DIALOG", "SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --faint: #5b626b; --line: #d5d9de; --tint: #f2f4f6;
  --bar: #2f6fae; --doubt: #a33c00; --doubt-tint: #fdf0e6; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e6e8ea; --faint: #a2a9b1;
  --line: #3a3f45; --tint: #212429; --bar: #6aa9e6; --doubt: #ffab73; --doubt-tint: #33251b; } }
@media print { :root { color-scheme: light; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.6rem, 2vw, 2rem); max-width: 110rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 1.6rem 0 .5rem; font-size: 1.15rem; }
dl { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: 0; }
dt { color: var(--faint); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: start; }
figure { margin: 1.2rem 0 0; width: 24rem; max-width: 100%; }
figcaption, .note { color: var(--faint); font-size: .9rem; }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 11px; }
svg line { stroke: var(--line); }
svg rect { fill: var(--bar); }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0; }
input, button { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--line);
  border-radius: .3rem; padding: .25rem .6rem; }
button { cursor: pointer; }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 1px; }
.scroll { overflow: auto; max-height: 92vh; border: 1px solid var(--line); }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
#cases { width: 100%; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: middle; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--tint); color: var(--faint); font-weight: 600; }
th[data-number], td.number { text-align: right; white-space: nowrap; }
tbody th { font-weight: 600; overflow-wrap: break-word; max-width: 20rem; }
#cases tbody th { position: sticky; left: 0; background: var(--paper); }
#cases thead th:nth-child(2) { left: 0; z-index: 2; }
.reason { overflow-wrap: anywhere; }
thead button { all: unset; cursor: pointer; white-space: nowrap; }
thead button:focus-visible { outline: 3px solid var(--bar); outline-offset: 3px; }
thead button::after { content: "\\2195"; display: inline-block; width: 1.1em; text-align: center; opacity: .45; }
[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
[aria-sort] { color: var(--ink); }
.picture { width: 1px; padding: .25rem; }
.picture button { display: block; padding: 0; border-color: transparent; background: none; cursor: zoom-in; }
.picture img { display: block; width: 15rem; height: 3.6rem; object-fit: cover; border-radius: .2rem; background: #000; }
#cases tr.doubtful > * { background: var(--doubt-tint); }
.doubt { display: block; color: var(--doubt); font-size: .85em; font-weight: 600; }
dialog { width: 100vw; max-width: 100vw; height: 100vh; height: 100dvh; max-height: none; margin: 0; border: 0;
  padding: .6rem; color: #e6e8ea; background: #000; }
dialog[open] { display: flex; flex-direction: column; gap: .5rem; }
dialog nav { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
dialog h2 { margin: 0 auto 0 0; overflow-wrap: anywhere; }
dialog p { margin: 0; font-size: .9rem; color: #a2a9b1; }
dialog button { background: #26292d; border-color: #4a5057; color: #e6e8ea; }
dialog [aria-pressed=true] { background: #e6e8ea; color: #000; }
.stage { flex: 1; min-height: 0; overflow: auto; display: flex; }
.stage img { margin: auto; max-width: 100%; max-height: 100%; }
.stage:not(.actual) img { width: 100%; height: 100%; object-fit: contain; }
.actual img { max-width: none; max-height: none; }
@media (max-width: 40rem) { .picture img { width: 8rem; height: 2.6rem; } th, td { padding: .3rem .45rem; } }
@media (scripting: none) { .controls, thead button::after { display: none; } }
@media print {
  body { padding: 0; max-width: none; font-size: 9pt; }
  .controls, dialog, thead button::after { display: none !important; }
  :focus-visible { outline: none; }
  .scroll { overflow: visible; max-height: none; border: 0; }
  thead th, #cases th { position: static; white-space: normal; }
  thead button { white-space: normal; }
  th, td { padding: .15rem .3rem; }
  tr, figure { break-inside: avoid; }
  .picture img { width: 9rem; height: 2.4rem; }
  .picture img, svg rect { print-color-adjust: exact; }
}
"""

SCRIPT = """
"use strict";
const cases = document.querySelector("#cases");
if (cases) {
  const body = cases.tBodies[0], headings = [...cases.tHead.rows[0].cells], rows = [...body.rows];
  const words = new Intl.Collator(undefined, {numeric: true});
  const name = row => row.querySelector("th").textContent;

  const sort = (heading, descending) => {
    const column = headings.indexOf(heading), sign = descending ? -1 : 1;
    const isNumber = "number" in heading.dataset;
    const keys = new Map(rows.map(row => {
      const text = row.cells[column].textContent, number = parseFloat(text);
      return [row, !isNumber ? text : Number.isNaN(number) ? Infinity * sign : number];  // what is missing comes last
    }));
    const compare = isNumber ? (a, b) => a < b ? -1 : a > b ? 1 : 0 : words.compare;
    rows.sort((a, b) => sign * compare(keys.get(a), keys.get(b)));
    body.append(...rows);
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  };
  for (const heading of headings)
    heading.querySelector("button")?.addEventListener("click",
      () => sort(heading, heading.getAttribute("aria-sort") === "ascending"));

  const filter = document.querySelector("#filter"), count = document.querySelector("#count");
  const narrow = () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !name(row).toLowerCase().includes(wanted);
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} cases`;
  };
  filter.addEventListener("input", narrow);
  narrow();  // a browser keeps what was typed over a reload

  const dialog = document.querySelector("dialog"), picture = dialog.querySelector("img");
  const stage = dialog.querySelector(".stage"), [previous, next, size, close] = dialog.querySelectorAll("button");
  let shown = null;
  const show = row => {
    if (!row) return;
    shown = row;
    const small = row.querySelector("img"), original = new Image();
    picture.src = small.src;
    picture.alt = `Overview picture of ${name(row)}`;
    original.onload = () => { if (shown === row) picture.src = original.src; };
    original.src = small.dataset.original;  // where the page still lies beside the results, it shows every pixel
    dialog.querySelector("h2").textContent = name(row);
    dialog.querySelector("p").textContent = headings.flatMap((heading, column) => "number" in heading.dataset
      ? [`${heading.textContent} ${[...row.cells[column].childNodes].map(node => node.textContent).join(", ")}`]
      : []).join(" \\u00b7 ");
    if (!dialog.open) dialog.showModal();
  };
  const step = by => {
    const visible = [...body.rows].filter(row => !row.hidden && row.querySelector("img"));
    show(visible[visible.indexOf(shown) + by]);
  };
  const zoom = () => size.setAttribute("aria-pressed", stage.classList.toggle("actual"));
  const leave = () => {
    if (stage.classList.contains("actual")) zoom();
    shown.querySelector("button").focus();
  };
  body.addEventListener("click", event => {
    if (event.target.closest("button")) show(event.target.closest("tr"));
  });
  previous.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  size.addEventListener("click", zoom);
  picture.addEventListener("click", zoom);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", leave);
  dialog.addEventListener("keydown", event => {
    if (stage.classList.contains("actual")) return;  // the arrows scroll the picture
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
}
"""

DIALOG = """<dialog aria-labelledby="shown">
<nav><h2 id="shown"></h2>
<button type="button">Previous</button> <button type="button">Next</button>
<button type="button" aria-pressed="false">Actual size</button> <button type="button" autofocus>Close</button></nav>
<p></p>
<div class="stage" tabindex="0"><img alt=""></div>
</dialog>
"""
