// The explorer says how high it is; it is a page of its own, in a frame of this site.
addEventListener("message", ({ data, source }) => {
  const frame = document.querySelector("iframe.explorer");
  if (frame?.contentWindow === source && data.explorer > 0) frame.style.height = `${data.explorer}px`;
});
