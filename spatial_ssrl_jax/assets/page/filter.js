// Shows the articles that agree with every select; a select's name is the data field it goes by.
const selects = [...document.querySelectorAll('.filters select')];
const articles = [...document.querySelectorAll('article')];
const shown = document.querySelector('.filters output');
function show() {
  for (const article of articles)
    article.hidden = selects.some(s => s.value !== 'all' && article.dataset[s.name] !== s.value);
  if (shown) shown.value = `${articles.filter(a => !a.hidden).length} of ${articles.length}`;
}
for (const select of selects) select.addEventListener('change', show);
show();
