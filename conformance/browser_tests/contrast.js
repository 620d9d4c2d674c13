// Texts whose contrast with what is behind them is below WCAG's 4.5 to 1.
const parse = (text) => {
  const [numbers, mixed] = [(text.match(/[\d.]+/g) || []).map(Number), text.startsWith("color(srgb")];
  return mixed ? numbers.map((v, at) => (at < 3 ? v * 255 : v)) : numbers;
};
const light = ([r, g, b]) => {
  const part = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const over = (top, alpha, below) => top.slice(0, 3).map((v, i) => v * alpha + below[i] * (1 - alpha));
const ground = (element) => {
  if (element === null) return [255, 255, 255];
  const color = parse(getComputedStyle(element).backgroundColor);
  const alpha = color.length > 3 ? color[3] : 1;
  return alpha === 1 ? color : over(color, alpha, ground(element.parentElement));
};
const behind = (element) => {
  const below = ground(element.closest("svg") || element);
  const rect = element.closest("g")?.querySelector("rect");
  if (!rect || !element.closest(".token")) return below;
  const style = getComputedStyle(rect);
  return over(parse(style.fill), Number(style.fillOpacity), below);
};
const poor = [];
for (const element of document.querySelectorAll("main *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || element.closest("title, option") || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(parse(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push(`${element.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
}
return [...new Set(poor)];
