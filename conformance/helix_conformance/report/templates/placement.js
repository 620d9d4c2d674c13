// The closed forms of helix_spec.placement (SPEC.md, section 3), for the explorer. A test compares
// them with those. A layout has the parts prompt, owner, pages, start, and the sizes c, t and i.
const div = (a, b) => Math.floor(a / b);
const logical = (layout, rank, shift) => (((rank - shift) % layout.c) + layout.c) % layout.c;
const promptChunk = (layout) => (layout.prompt === "interleave" ? layout.i : layout.t);
const ownerChunk = (layout) => (layout.owner === "interleave" ? layout.i : layout.t);
const origin = (layout, promptLen) => (layout.owner === "step" ? 0 : promptLen);

const chunkOwner = (position, c, i) => div(position, i) % c;
function chunkLocalLen(length, rank, c, i) {
  const rounds = div(length, i * c);
  return rounds * i + Math.max(0, Math.min(length - rounds * c * i - rank * i, i));
}
const chunkPosition = (index, rank, c, i) => (div(index, i) * c + rank) * i + (index % i);
function contiguousStart(length, rank, c, t) {
  const blocks = Math.ceil(length / t);
  return Math.min(length, (rank * div(blocks, c) + Math.min(rank, blocks % c)) * t);
}
function contiguousOwner(position, length, c, t) {
  const blocks = Math.ceil(length / t);
  const [share, larger, block] = [div(blocks, c), blocks % c, div(position, t)];
  const first = larger * (share + 1);
  return block < first ? div(block, share + 1) : larger + div(block - first, share);
}

function promptLocalLen(layout, promptLen, rank, shift) {
  const [own, { c, t }] = [logical(layout, rank, shift), layout];
  if (layout.prompt !== "contiguous") return chunkLocalLen(promptLen, own, c, promptChunk(layout));
  return contiguousStart(promptLen, own + 1, c, t) - contiguousStart(promptLen, own, c, t);
}
function localLen(layout, promptLen, steps, rank, shift) {
  const [own, c, i] = [logical(layout, rank, shift), layout.c, ownerChunk(layout)];
  const [inPrompt, from] = [promptLocalLen(layout, promptLen, rank, shift), origin(layout, promptLen)];
  if (layout.owner === "last_rank") return inPrompt + (own === c - 1 ? steps : 0);
  return inPrompt + chunkLocalLen(from + steps, own, c, i) - chunkLocalLen(from, own, c, i);
}
function ownerOf(layout, promptLen, position, shift) {
  const [c, step] = [layout.c, position - promptLen];
  let own = c - 1;
  if (step < 0 && layout.prompt === "contiguous") own = contiguousOwner(position, promptLen, c, layout.t);
  else if (step < 0) own = chunkOwner(position, c, promptChunk(layout));
  else if (layout.owner !== "last_rank") own = chunkOwner(origin(layout, promptLen) + step, c, ownerChunk(layout));
  return (own + shift) % c;
}
// Infinity where the rank never gets that many tokens.
function positionOf(layout, promptLen, rank, index, shift) {
  const [own, c, i] = [logical(layout, rank, shift), layout.c, ownerChunk(layout)];
  const decoded = index - promptLocalLen(layout, promptLen, rank, shift);
  if (decoded < 0 && layout.prompt === "contiguous") return contiguousStart(promptLen, own, c, layout.t) + index;
  if (decoded < 0) return chunkPosition(index, own, c, promptChunk(layout));
  if (layout.owner === "last_rank") return own === c - 1 ? promptLen + decoded : Infinity;
  const from = origin(layout, promptLen);
  return promptLen - from + chunkPosition(chunkLocalLen(from, own, c, i) + decoded, own, c, i);
}
function pagesNeeded(layout, promptLen, steps, rank, shift) {
  if (layout.pages === "lockstep") return Math.ceil((promptLen + steps) / (layout.t * layout.c));
  return Math.ceil(localLen(layout, promptLen, steps, rank, shift) / layout.t);
}
// Of pools of so many pages on every rank.
function capacity(layout, pages, promptLen, shift) {
  if (layout.pages === "lockstep") return pages * layout.t * layout.c;
  const ranks = [...Array(layout.c).keys()];
  return Math.min(...ranks.map((rank) => positionOf(layout, promptLen, rank, pages * layout.t, shift)));
}

// The canonical identifier, and why a layout is not legal (empty where it is).
function layoutText({ prompt, owner, pages, start, c, t, i }) {
  const named = Object.entries(NAMED).find(([, rule]) => rule.join() === [prompt, owner, pages, start].join());
  const sizes = `C=${c},T=${t}`;
  if (named) return `${named[0]}/1:${sizes}` + (owner === "interleave" ? `,I=${i}` : "");
  const turns = (rule) => (rule === "interleave" ? `interleave(${i})` : rule);
  return `custom/1:prompt=${turns(prompt)},owner=${turns(owner)},pages=${pages},start=${start},${sizes}`;
}
function layoutProblem({ prompt, owner, pages, t, i }) {
  if ([prompt, owner].includes("interleave") && t % i) return `I = ${i} does not divide T = ${t}.`;
  const inTurn = ["round_robin position", "interleave interleave"].includes(`${prompt} ${owner}`);
  if (pages === "lockstep" && !inTurn) return "Under lockstep a rank could lack a page that it needs: it is legal only for round_robin with position, and for interleave with interleave.";
  return "";
}
