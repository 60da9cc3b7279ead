"use strict";
const query = document.getElementById("query");
const status = document.getElementById("status");
const shown = document.getElementById("shown");
const cases = [...document.querySelectorAll("#cases > details")];
function filter() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const item of cases) {
    const fits = (!status.value || item.dataset.status === status.value)
      && words.every((word) => item.dataset.text.includes(word));
    item.hidden = !fits;
    count += fits;
  }
  shown.textContent = `${count} of ${cases.length}`;
}
query.addEventListener("input", filter);
status.addEventListener("change", filter);
document.getElementById("filter").hidden = false;
filter();
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const code = button.previousElementSibling;
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    const done = () => { button.textContent = "copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, () => {});
    else if (document.execCommand("copy")) done();
  });
}
