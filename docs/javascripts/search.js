// The search reads "-word" as "without word", so it would find no flag: drop the dashes.
document.addEventListener("input", ({ target }) => {
  if (target.matches("[data-md-component=search-query]"))
    target.value = target.value.replace(/(^|\s)-+/g, "$1");
}, true);
