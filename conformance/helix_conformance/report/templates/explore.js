// What the fields say is drawn, and kept in the address after `#`: as a link it opens the same.
const MAX_CELLS = 16; // as in diagram.py: larger pages are drawn as runs
const [MAX_PAGES, MAX_DRAWN] = [32, 256]; // pages of a rank, and boxes in them
const PARTS = ["prompt", "owner", "pages", "start"];
const [form, slider] = [document.querySelector("form"), document.querySelector("#slider")];
const add = (parent, tag, kind, text = "") => {
  const made = parent.appendChild(document.createElement(tag));
  [made.className, made.textContent] = [kind, text];
  return made;
};
const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

function fields() {
  const values = {};
  for (const field of form.querySelectorAll("[name]")) {
    const number = Math.trunc(Number(field.value)) || 0;
    const inside = Math.max(Number(field.min), Math.min(Number(field.max), number));
    values[field.name] = field.type === "number" ? inside : field.value;
  }
  return values;
}
const layoutOf = (values, side) => ({
  ...Object.fromEntries(PARTS.map((part) => [part, values[side + part]])),
  c: values.C, t: values.T, i: values.I,
});

// Tokens side by side in a page: [first, last, how many, decoded, elsewhere in the other layout].
function runs(positions, values, moved) {
  const found = [];
  for (const position of positions) {
    const kind = [position >= values.L, moved(position)];
    const run = found.at(-1);
    const stride = run && (run[2] > 1 ? (run[1] - run[0]) / (run[2] - 1) : position - run[1]);
    const goesOn = run && position - run[1] === stride && kind[0] === run[3] && kind[1] === run[4];
    if (goesOn && (run[2] > 1 || stride === 1 || stride === values.C) && values.T > MAX_CELLS) [run[1], run[2]] = [position, run[2] + 1];
    else found.push([position, position, 1, ...kind]);
  }
  return found;
}
function label([first, last, tokens]) {
  const stride = (last - first) / (tokens - 1);
  return tokens === 1 ? `${first}` : `${first}\u2013${last}` + (stride > 1 ? ` by ${stride}` : "");
}

const heldBy = (layout, { L, steps }, shift) =>
  [...Array(layout.c).keys()].map((rank) => localLen(layout, L, steps, rank, shift));

function drawLayout(section, layout, values, shift, scale, moved) {
  const { L, steps } = values;
  section.querySelector("code").textContent = layoutText(layout);
  const [facts, ranks] = [section.querySelector(".facts"), section.querySelector(".ranks")];
  facts.replaceChildren();
  ranks.replaceChildren();
  const problem = layoutProblem(layout);
  if (problem) return void add(facts, "p", "bad problem", problem);
  const held = heldBy(layout, values, shift);
  const [largest, mean] = [Math.max(...held), (L + steps) / layout.c];
  const [reach, room] = [capacity(layout, values.P, L, shift), values.P * layout.t * layout.c];
  const tell = (kind, name, value, more) => {
    const line = add(facts, "p", kind, `${name}: `);
    add(line, "strong", "", value);
    add(line, "span", "quiet", ` (${more})`);
  };
  tell("balance", "Largest / mean", (largest / mean).toFixed(2), `${count(largest, "token")} / ${mean.toFixed(1)}; spread ${largest - Math.min(...held)}`);
  tell("capacity", "Capacity", count(reach, "token"), `${((100 * reach) / room).toFixed(0)} % of ${count(room, "slot")} in pools of ${count(values.P, "page")}${reach < L + steps ? "; more is asked for" : ""}`);
  tell("next", "The next token is written by", `rank ${ownerOf(layout, L, L + steps, shift)}`, `position ${L + steps}`);
  held.forEach((tokens, rank) => {
    const pages = pagesNeeded(layout, L, steps, rank, shift);
    const row = add(ranks, "div", `rank owner${rank % 8}`);
    add(row, "p", "held", `rank ${rank}: ${count(tokens, "token")}, ${count(pages, "page")}`);
    add(row, "div", "bar").style.width = `${(100 * tokens) / scale}%`;
    const drawn = add(row, "div", "pages");
    let page = 0;
    for (; page < Math.min(pages, MAX_PAGES) && drawn.querySelectorAll("span").length < MAX_DRAWN; page++) {
      const box = add(drawn, "div", "page");
      box.title = `rank ${rank}, page ${page}`;
      const local = [];
      for (let index = page * layout.t; index < Math.min(tokens, (page + 1) * layout.t); index++) {
        local.push(positionOf(layout, L, rank, index, shift));
      }
      for (const run of runs(local, values, moved)) {
        add(box, "span", `token ${run[3] ? "decoded" : "prompt"}${run[4] ? " moved" : ""}`, label(run)).style.flexGrow = run[2];
      }
      const free = layout.t - local.length;
      if (free) add(box, "span", "free").style.flexGrow = free;
    }
    if (page < pages) add(row, "p", "quiet", `and ${count(pages - page, "page")} more`);
  });
}

function draw() {
  const values = fields();
  const layouts = [layoutOf(values, "a"), layoutOf(values, "b")];
  const shifts = layouts.map((layout) => (layout.start === "rotated" ? values.before % values.C : 0));
  const owners = layouts.map((layout, at) => (position) => ownerOf(layout, values.L, position, shifts[at]));
  const legal = !layouts.some(layoutProblem);
  const elsewhere = (position) => legal && owners[0](position) !== owners[1](position);
  let [differ, first] = [0, null];
  for (let position = 0; position < values.L + values.steps; position++) {
    if (elsewhere(position)) [differ, first] = [differ + 1, first ?? position];
  }
  document.querySelector("#difference").textContent = !legal ? "One of the layouts is not legal."
    : differ === 0 ? "Both layouts put every token on the same rank."
    : `${count(differ, "token")} of ${(values.L + values.steps).toLocaleString("en")} on another rank; the first is position ${first}: rank ${owners[0](first)} under the first layout, rank ${owners[1](first)} under the second.`;
  const scale = Math.max(...layouts.flatMap((layout, at) => heldBy(layout, values, shifts[at])));
  layouts.forEach((layout, at) => {
    const section = document.querySelector(`#layout-${"ab"[at]}`);
    drawLayout(section, layout, values, shifts[at], scale, at ? elsewhere : () => false);
  });
  const rotated = layouts.some((layout) => layout.start === "rotated");
  document.querySelector("#before").hidden = !rotated;
  history.replaceState(null, "", `#${new URLSearchParams(values)}`);
}

// A named layout sets the four parts; parts that have no name are `custom`.
function named(side) {
  const rule = NAMED[form.elements[side].value];
  PARTS.forEach((part, at) => {
    if (rule) form.elements[side + part].value = rule[at];
  });
}
function name(side) {
  const parts = PARTS.map((part) => form.elements[side + part].value);
  const found = Object.entries(NAMED).find(([, rule]) => rule.join() === parts.join());
  form.elements[side].value = found ? found[0] : "custom";
}
function read() {
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = form.elements.namedItem(key);
    if (!field) continue;
    field.value = value;
    if (field.selectedIndex === -1) field.selectedIndex = 0;
    if (key in { a: 0, b: 0 }) named(key);
  }
  for (const side of "ab") name(side);
  slider.value = form.elements.steps.value;
  draw();
}
form.addEventListener("input", ({ target }) => {
  if (target === slider) form.elements.steps.value = target.value;
  if (target.name === "steps") slider.value = target.value;
  if (target.name in { a: 0, b: 0 }) named(target.name);
  else for (const side of "ab") name(side);
  draw();
});
form.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", read);
for (const side of "ab") named(side);
read();
// A page of the site that shows this one gives it the room that it needs.
const tell = () => parent.postMessage({ explorer: document.documentElement.offsetHeight }, "*");
if (parent !== window) new ResizeObserver(tell).observe(document.documentElement);
