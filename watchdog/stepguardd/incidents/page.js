(() => {
  const d = JSON.parse(document.getElementById('curve-data').textContent);
  const draw = () => {
    const css = getComputedStyle(document.documentElement), c = (n) => css.getPropertyValue(n).trim();
    const known = d.values.filter((v) => v !== null).concat(d.refused.map((r) => r.reward).filter((v) => v !== null));
    const low = Math.min(0, ...known), high = Math.max(1e-9, ...known);
    const data = [
      {x: d.steps, y: d.values, mode: 'lines', type: 'scatter', line: {color: c('--blue'), width: 1.8},
       hovertemplate: 'step %{x}<br>reward %{y:.4g}<extra></extra>'},
      {x: d.refused.map((r) => r.step), y: d.refused.map((r) => r.reward ?? low), text: d.refused.map((r) => r.why),
       mode: 'markers', type: 'scatter', marker: {color: c('--bad'), size: 11, symbol: 'x'},
       hovertemplate: 'step %{x}: batch refused<br>reward %{y:.4g}<br>%{text}<extra></extra>'},
      {x: d.saved, y: d.saved.map(() => low - 0.04 * (high - low)), mode: 'markers', type: 'scatter',
       marker: {color: c('--soft'), size: 9, symbol: 'triangle-up'},
       hovertemplate: 'checkpoint of step %{x}<extra></extra>'}];
    const shapes = [], annotations = [];
    if (d.held) {
      shapes.push({type: 'rect', xref: 'x', yref: 'paper', x0: d.held[0], x1: d.held[1], y0: 0, y1: 1,
        fillcolor: c('--bad'), opacity: 0.2, line: {color: c('--bad'), width: 1}, layer: 'below'});
      annotations.push({x: d.held[1], xref: 'x', y: 1, yref: 'paper', yanchor: 'top', xanchor: 'left', showarrow: false,
        text: ' held ' + d.heldFor, font: {color: c('--bad')}});
    }
    const axis = {gridcolor: c('--line'), zeroline: false, color: c('--soft')};
    Plotly.react('curve', data, {margin: {l: 48, r: 12, t: 8, b: 40}, showlegend: false, hovermode: 'closest',
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: {color: c('--ink'), family: 'inherit'},
      xaxis: {...axis, title: {text: 'step'}, range: [d.from, d.to]}, yaxis: {...axis, title: {text: 'reward'}},
      shapes, annotations}, {responsive: true, displayModeBar: false});
  };
  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
})();
