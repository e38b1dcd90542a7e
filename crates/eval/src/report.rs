//! The figures of models as JSON, as a table for the terminal, and as a Markdown page.

use std::fmt::Write;

use liquidgemm::Group;
use serde::Serialize;

use crate::evaluate::{LayerError, Score};
use crate::model::Network;
use crate::{Method, Recipe, Smoothing};

/// The figures of one model.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// The model's name.
    pub model: String,
    /// The text that it was measured on.
    pub text: String,
    /// Forward passes over that text.
    pub passes: usize,
    /// Tokens of that text.
    pub tokens: usize,
    /// What it was calibrated with.
    pub calibration: Option<String>,
    /// Where the quantized layers were computed.
    pub backend: String,
    /// One for each recipe.
    pub rows: Vec<Row>,
}

/// The figures of one recipe.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// How weights were quantized.
    pub method: String,
    /// The weights that share a pair, if they were quantized.
    pub group: Option<String>,
    /// How inputs were smoothed.
    pub smoothing: Option<String>,
    /// What of the model's result is kept.
    pub score: Score,
    /// The layers with the largest errors.
    pub layers: Vec<LayerError>,
}

impl Row {
    /// Makes a row.
    pub fn new(recipe: &Recipe, score: Score, layers: Vec<LayerError>) -> Self {
        let group = (recipe.method != Method::A8).then(|| recipe.group.to_string());
        let smoothing = recipe.smooth.map(|smooth| smooth.to_string());
        Self { method: recipe.method.to_string(), group, smoothing, score, layers }
    }
}

/// Returns the recipes of the accuracy page for such a model.
pub fn recipes(network: &Network) -> Vec<Recipe> {
    let encoder = matches!(network, Network::Encoder(_));
    let groups = [Group::K(64), Group::K(128), Group::Channel];
    let groups = if encoder { &groups[..] } else { &groups[..2] };
    let recipe = |method, group, smooth| Recipe { method, group, smooth };
    let half = Some(Smoothing::Alpha(0.5));
    let mut recipes = Vec::new();
    for method in [Method::Rtn, Method::Search, Method::Weighted, Method::Gptq] {
        recipes.extend(groups.iter().map(|&group| recipe(method, group, None)));
    }
    for smooth in [half, Some(Smoothing::Auto)] {
        recipes.extend(groups.iter().map(|&group| recipe(Method::Gptq, group, smooth)));
    }
    recipes.extend(
        [None, half, Some(Smoothing::Auto)].map(|smooth| recipe(Method::A8, Group::default(), smooth)),
    );
    recipes
}

impl Evaluation {
    /// Returns the figures as text for a terminal.
    pub fn table(&self) -> String {
        let mut text =
            format!("{}, {} tokens of {} in {} passes\n", self.model, self.tokens, self.text, self.passes);
        let mut line = |line: std::fmt::Arguments<'_>| writeln!(text, "{line}").expect("a String takes all");
        line(format_args!("backend {}", self.backend));
        if let Some(calibration) = &self.calibration {
            line(format_args!("calibrated with {calibration}"));
        }
        if let Some(Row { score: Score::Language { float_perplexity, .. }, .. }) = self.rows.first() {
            line(format_args!("perplexity in float {float_perplexity:.3}"));
        }
        line(format_args!(""));
        for row in &self.rows {
            line(format_args!(
                "{:<9} {:<8} {:<12} {}",
                row.method,
                row.group(),
                row.smoothing(),
                row.figures()
            ));
            for LayerError { layer, relative_error } in &row.layers {
                line(format_args!("    {:6.2} %  {layer}", relative_error * 100.0));
            }
        }
        text
    }

    /// Returns the figures as a section of a Markdown page.
    pub fn markdown(&self) -> String {
        let mut text = format!("## {}\n\n", self.model);
        let mut line = |line: std::fmt::Arguments<'_>| writeln!(text, "{line}").expect("a String takes all");
        line(format_args!(
            "Measured on {}: {} tokens in {} forward passes.",
            self.text, self.tokens, self.passes
        ));
        if let Some(calibration) = &self.calibration {
            line(format_args!("Calibrated with {calibration}."));
        }
        let language = self.rows.iter().find_map(|row| match row.score {
            Score::Language { float_perplexity, .. } => Some(float_perplexity),
            Score::Embedding { .. } => None,
        });
        if let Some(perplexity) = language {
            line(format_args!("The perplexity in float is {perplexity:.3}."));
            line(format_args!(
                "\n| method | group | smoothing | perplexity | increase | same next token | KL divergence |"
            ));
            line(format_args!("|---|---|---|---|---|---|---|"));
        } else {
            line(format_args!("\n| method | group | smoothing | mean cosine | least cosine |"));
            line(format_args!("|---|---|---|---|---|"));
        }
        for row in &self.rows {
            let cells = match row.score {
                Score::Embedding { cosine, least_cosine, .. } => format!("{cosine:.4} | {least_cosine:.4}"),
                Score::Language { perplexity, increase_percent, agreement, divergence, .. } => format!(
                    "{perplexity:.3} | {increase_percent:+.1} % | {:.1} % | {divergence:.4}",
                    agreement * 100.0
                ),
            };
            line(format_args!("| {} | {} | {} | {cells} |", row.method, row.group(), row.smoothing()));
        }
        text + &self.markdown_layers()
    }

    /// Returns the table of the layers with the largest errors, for the rows that have them.
    fn markdown_layers(&self) -> String {
        let mut text = String::new();
        for row in self.rows.iter().filter(|row| !row.layers.is_empty()) {
            let [group, smoothing] =
                [row.group(), &row.smoothing()].map(|part| part.trim_matches('–').to_owned());
            let name = [row.method.as_str(), &group, &smoothing].join(" ");
            write!(text, "\nLayers with the largest errors, `{}`:\n\n", name.trim())
                .expect("a String takes all");
            text.push_str("| layer | relative error of its output |\n|---|---|\n");
            for LayerError { layer, relative_error } in &row.layers {
                writeln!(text, "| {layer} | {:.2} % |", relative_error * 100.0).expect("a String takes all");
            }
        }
        text
    }
}

impl Row {
    fn group(&self) -> &str {
        self.group.as_deref().unwrap_or("–")
    }

    fn smoothing(&self) -> String {
        self.smoothing.as_ref().map_or("–".into(), |smoothing| format!("α = {smoothing}"))
    }

    fn figures(&self) -> String {
        match self.score {
            Score::Embedding { cosine, least_cosine, .. } => {
                format!("cosine {cosine:.4}, at least {least_cosine:.4}")
            }
            Score::Language { perplexity, increase_percent, agreement, divergence, .. } => format!(
                "perplexity {perplexity:.3} ({increase_percent:+.1} %), same next token {:.1} %, KL {divergence:.4}",
                agreement * 100.0
            ),
        }
    }
}

/// Returns the accuracy page: what is measured, and the figures of each model.
pub fn page(evaluations: &[Evaluation]) -> String {
    let mut text = String::from(PAGE);
    for evaluation in evaluations {
        text.push('\n');
        text.push_str(&evaluation.markdown());
    }
    text
}

const PAGE: &str = "# Accuracy

`cargo xtask accuracy` fetches the models, measures them, and writes this page and the JSON file beside it.

All linear layers but embeddings and the head are quantized: weights to 4 bits by the given method and group, activations to int8
with a scale for each token. `a8` quantizes activations alone. Everything else is f32, as in the float run that results are compared with.

- **Cosine**: between a sentence's embedding in float and with quantized layers, over 200 sentences.
- **Perplexity**: exp of the mean negative log-likelihood of each next token. The text is cut into windows; each is a forward pass of its own.
- **Same next token**: the share of positions where both runs have the same most likely token.
- **KL divergence**: from the float distribution of the next token to the quantized one, in nats, the mean over positions.
- **Error of a layer**: `‖Y − Y_float‖ / ‖Y_float‖` of its output, for the inputs of the float run.

| method | codes are chosen by |
|---|---|
| `rtn` | the paper's recipe, round to nearest |
| `search` | a search of each group's pair for the smallest error of the weights; needs no data |
| `weighted` | the same search, errors weighted by the inputs' second moments |
| `gptq` | GPTQ, with the Hessian of the inputs |

Smoothing divides inputs by a vector, which the weights are multiplied by (SmoothQuant); α is its exponent.
Calibration never sees the text of the evaluation.
";

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(score: Score) -> Evaluation {
        let recipe =
            Recipe { method: Method::Rtn, group: Group::Channel, smooth: Some(Smoothing::Alpha(0.5)) };
        let layers = vec![LayerError { layer: "first".into(), relative_error: 0.125 }];
        Evaluation {
            model: "tiny".into(),
            text: "a text".into(),
            passes: 2,
            tokens: 30,
            calibration: None,
            backend: "CPU".into(),
            rows: vec![Row::new(&recipe, score, layers)],
        }
    }

    #[test]
    fn pages_have_a_row_of_as_many_cells_as_the_head_for_each_recipe() {
        let embedding = Score::Embedding { sentences: 2, cosine: 0.98765, least_cosine: 0.9 };
        let language = Score::Language {
            tokens: 28,
            float_perplexity: 20.0,
            perplexity: 25.0,
            increase_percent: 25.0,
            agreement: 0.75,
            divergence: 0.125,
        };
        for (score, row) in [
            (embedding, "| rtn | channel | α = 0.5 | 0.9877 | 0.9000 |"),
            (language, "| rtn | channel | α = 0.5 | 25.000 | +25.0 % | 75.0 % | 0.1250 |"),
        ] {
            let page = page(&[evaluation(score)]);
            assert!(page.contains(row), "{page}");
            let head = page.lines().find(|line| line.starts_with("| method | group")).unwrap();
            assert_eq!(head.matches('|').count(), row.matches('|').count());
            assert!(page.contains("| first | 12.50 % |"), "{page}");
        }
    }
}
