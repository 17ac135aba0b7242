// Under the pointer, each figure tells the values at the nearest step.
for (const figure of document.querySelectorAll('figure[data-curves]')) {
  const {steps, series, left, right} = JSON.parse(figure.dataset.curves);
  const svg = figure.querySelector('svg'), cursor = svg.querySelector('.cursor');
  const out = figure.querySelector('output'), low = steps[0], span = steps.at(-1) - low || 1;
  const place = step => left + (step - low) / span * (right - left);
  const write = v => Number(v.toPrecision(4)).toString();
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / box.width * width;
    const near = steps.reduce((a, b) => Math.abs(place(b) - x) < Math.abs(place(a) - x) ? b : a);
    const at = steps.indexOf(near);
    out.value = `step ${near}: ` + Object.entries(series)
      .filter(([, values]) => values[at] !== null)
      .map(([name, values]) => `${name} ${write(values[at])}`.trim()).join(' · ');
    cursor.setAttribute('transform', `translate(${place(near)})`);
    cursor.style.visibility = 'visible';
  });
  svg.addEventListener('pointerleave', () => { out.value = ''; cursor.style.visibility = ''; });
}
