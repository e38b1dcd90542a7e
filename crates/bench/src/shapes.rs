//! Lists of problems to measure: the linear layers of well-known models, the points at which the peer kernels
//! were measured ([`peers`](super::peers)), and lists from the command line.

use anyhow::{Context, bail};

pub use super::matrix::Matrix;
use super::matrix::distinct;

/// A weight matrix with the batch sizes to measure it at, in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The size of the weight matrix.
    pub matrix: Matrix,
    /// Batch sizes in tokens.
    pub tokens: Vec<usize>,
}

/// The dimensions of a decoder that determine its linear layers.
struct Model {
    name: &'static str,
    hidden: usize,
    /// Width of the keys, and also of the values. With grouped-query attention, shared heads count once.
    key_value: usize,
    intermediate: usize,
}

const MODELS: [Model; 7] = [
    Model { name: "LLaMA-2-7B", hidden: 4096, key_value: 4096, intermediate: 11008 },
    Model { name: "LLaMA-2-13B", hidden: 5120, key_value: 5120, intermediate: 13824 },
    Model { name: "LLaMA-2-70B", hidden: 8192, key_value: 1024, intermediate: 28672 },
    LLAMA_3_70B,
    Model { name: "LLaMA-3-8B", hidden: 4096, key_value: 1024, intermediate: 14336 },
    Model { name: "Mistral-7B", hidden: 4096, key_value: 1024, intermediate: 14336 },
    Model { name: "Yi-34B", hidden: 7168, key_value: 1024, intermediate: 20480 },
];

/// The model whose tensor-parallel shards are measured.
const LLAMA_3_70B: Model = Model { name: "LLaMA-3-70B", hidden: 8192, key_value: 1024, intermediate: 28672 };
/// Numbers of GPUs that its layers are sharded over.
const SHARDED_OVER: [usize; 2] = [4, 8];

impl Model {
    /// The layers sharded for tensor parallelism: QKV and gate-up along N, O and down along K.
    fn shards(&self, gpus: usize) -> [(&'static str, Matrix); 4] {
        self.layers().map(|(name, Matrix { n, k })| match name {
            "O" | "down" => (name, Matrix { n, k: k / gpus }),
            _ => (name, Matrix { n: n / gpus, k }),
        })
    }

    /// The linear layers of a decoder block, with their names.
    fn layers(&self) -> [(&'static str, Matrix); 4] {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        [
            ("QKV", Matrix { n: hidden + 2 * self.key_value, k: hidden }),
            ("O", Matrix { n: hidden, k: hidden }),
            ("gate-up", Matrix { n: 2 * intermediate, k: hidden }),
            ("down", Matrix { n: hidden, k: intermediate }),
        ]
    }
}

/// The layers that have this matrix, such as `LLaMA-2-7B O, LLaMA-3-8B O`. Empty if no model here has it.
pub fn origin(matrix: Matrix) -> String {
    let mut names = Vec::new();
    for model in &MODELS {
        for (layer, candidate) in model.layers() {
            if candidate == matrix {
                names.push(format!("{} {layer}", model.name));
            }
        }
    }
    for gpus in SHARDED_OVER {
        for (layer, candidate) in LLAMA_3_70B.shards(gpus) {
            if candidate == matrix {
                names.push(format!("{} {layer} on {gpus} GPUs", LLAMA_3_70B.name));
            }
        }
    }
    names.join(", ")
}

/// Batch sizes between the powers of two.
const BETWEEN: [usize; 26] = [
    24, 40, 48, 56, 72, 80, 96, 112, 136, 160, 176, 192, 208, 224, 240, 272, 320, 352, 384, 448, 640, 768,
    896, 1280, 1536, 3072,
];
/// Batch sizes of the shards between the powers of two.
const SHARDS_BETWEEN: [usize; 10] = [24, 48, 96, 160, 192, 224, 320, 384, 640, 768];
/// Batch sizes of [`monotone_cases`] that are not multiples of 8 or exceed 512.
/// Many are just above a token tile.
const ODD: [usize; 12] = [17, 33, 65, 100, 129, 200, 257, 333, 500, 513, 1000, 1025];
/// One matrix of each layer, for plots of time against M in steps of 8.
const CURVES: [Matrix; 4] = [
    Matrix { n: 4096, k: 4096 },
    Matrix { n: 12288, k: 4096 },
    Matrix { n: 28672, k: 4096 },
    Matrix { n: 8192, k: 28672 },
];

/// The batch sizes 1, 8, 16 … 512.
fn steps_of_eight() -> Vec<usize> {
    std::iter::once(1).chain((8..=512).step_by(8)).collect()
}

/// The peer kernels' matrices at batch sizes between the powers of two.
pub fn between_cases() -> Vec<Case> {
    custom_cases(&peer_matrices(), &BETWEEN)
}

/// LLaMA-3-70B's layers sharded over 4 and 8 GPUs, at M = 1, 2, 4 … 1024 and ten batch sizes between.
pub fn shard_cases() -> Vec<Case> {
    let matrices: Vec<Matrix> =
        SHARDED_OVER.iter().flat_map(|&gpus| LLAMA_3_70B.shards(gpus)).map(|(_, matrix)| matrix).collect();
    custom_cases(&matrices, &[powers_of_two(1024), SHARDS_BETWEEN.to_vec()].concat())
}

/// Whether a matrix is one of the shards.
pub fn is_shard(matrix: Matrix) -> bool {
    SHARDED_OVER.iter().flat_map(|&gpus| LLAMA_3_70B.shards(gpus)).any(|(_, shard)| shard == matrix)
}

/// The peer kernels' matrices at M = 1, 8, 16 … 512 and at a few irregular batch sizes up to 1025.
pub fn monotone_cases() -> Vec<Case> {
    custom_cases(&peer_matrices(), &[steps_of_eight(), ODD.to_vec()].concat())
}

/// One matrix of each layer at M = 1, 8, 16 … 512.
pub fn curve_cases() -> Vec<Case> {
    custom_cases(&CURVES, &steps_of_eight())
}

/// The distinct matrices that the peer kernels were measured on.
pub fn peer_matrices() -> Vec<Matrix> {
    distinct(super::peers::pages()[0].points.iter().map(super::peers::PeerPoint::matrix))
}

/// Merges lists: each matrix once, with the batch sizes of all lists.
pub fn merged(lists: impl IntoIterator<Item = Vec<Case>>) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for Case { matrix, tokens } in lists.into_iter().flatten() {
        match cases.iter_mut().find(|case| case.matrix == matrix) {
            Some(case) => case.tokens.extend(tokens),
            None => cases.push(Case { matrix, tokens }),
        }
    }
    for case in &mut cases {
        case.tokens.sort_unstable();
        case.tokens.dedup();
    }
    cases
}

/// The powers of two up to `last`.
fn powers_of_two(last: usize) -> Vec<usize> {
    std::iter::successors(Some(1), |m| Some(m * 2)).take_while(|&m| m <= last).collect()
}

/// Every linear layer of the models, each shape once, at M = 1, 2, 4 … 8192.
pub fn default_cases() -> Vec<Case> {
    let matrices = distinct(MODELS.iter().flat_map(Model::layers).map(|(_, matrix)| matrix));
    custom_cases(&matrices, &powers_of_two(8192))
}

/// Twelve points that cover every band of batch sizes.
pub fn quick_cases() -> Vec<Case> {
    custom_cases(&[Matrix { n: 22016, k: 4096 }, Matrix { n: 8192, k: 8192 }], &[1, 8, 32, 128, 1024, 4096])
}

/// The feed-forward matrices of LLaMA-2-7B and -70B at M = 1, 2, 4 … 1024.
pub fn ablation_cases() -> Vec<Case> {
    let models = MODELS.iter().filter(|model| ["LLaMA-2-7B", "LLaMA-2-70B"].contains(&model.name));
    let layers = models.flat_map(Model::layers).filter(|(name, _)| ["gate-up", "down"].contains(name));
    let matrices: Vec<Matrix> = layers.map(|(_, matrix)| matrix).collect();
    custom_cases(&matrices, &powers_of_two(1024))
}

/// The points of the first page of peer kernels, and M = N = K = 8192.
pub fn peer_cases() -> Vec<Case> {
    let cube = Case { matrix: Matrix { n: 8192, k: 8192 }, tokens: vec![8192] };
    let points = super::peers::pages()[0].points.iter();
    let points = points.map(|point| vec![Case { matrix: point.matrix(), tokens: vec![point.m] }]);
    merged(points.chain([vec![cube]]))
}

/// Every matrix at every batch size.
pub fn custom_cases(matrices: &[Matrix], tokens: &[usize]) -> Vec<Case> {
    let mut tokens = tokens.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    matrices.iter().map(|&matrix| Case { matrix, tokens: tokens.clone() }).collect()
}

/// Parses batch sizes: numbers separated by commas, or `a..b` for the powers of two from a to b.
///
/// # Errors
/// If a part is neither, or a batch size is 0.
pub fn parse_tokens(text: &str) -> anyhow::Result<Vec<usize>> {
    let mut tokens = Vec::new();
    for part in text.split(',') {
        let number = |text: &str| {
            text.trim().parse::<usize>().with_context(|| format!("{text:?} is not a number of tokens"))
        };
        match part.split_once("..") {
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                tokens.extend(powers_of_two(last).into_iter().filter(|&m| m >= first));
            }
            None => tokens.push(number(part)?),
        }
    }
    if tokens.is_empty() || tokens.contains(&0) {
        bail!("{text:?} has no batch size, or one of 0; write 1,16,256 or 1..8192");
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrix_sizes_are_parsed_and_malformed_ones_refused() {
        assert_eq!("4096x11008".parse::<Matrix>().unwrap(), Matrix { n: 4096, k: 11008 });
        assert_eq!("64×128".parse::<Matrix>().unwrap().to_string(), "64x128");
        for wrong in ["", "4096", "x", "0x4096", "4096x0", "ax7", "1x2x3", "-1x2"] {
            assert!(wrong.parse::<Matrix>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn tokens_are_numbers_and_ranges_of_powers_of_two() {
        assert_eq!(parse_tokens("1,17, 64").unwrap(), [1, 17, 64]);
        assert_eq!(parse_tokens("16..128,5").unwrap(), [16, 32, 64, 128, 5]);
        for wrong in ["", "0", "a", "3..3", "1,,2", "8..4"] {
            assert!(parse_tokens(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn default_list_has_every_layer_once_and_includes_the_peers_matrices() {
        let cases = default_cases();
        let mut matrices: Vec<Matrix> = cases.iter().map(|case| case.matrix).collect();
        assert_eq!(matrices.len(), 19);
        assert!(cases.iter().all(|case| case.tokens.len() == 14));
        for case in peer_cases() {
            assert!(matrices.contains(&case.matrix), "{}", case.matrix);
        }
        matrices.sort_unstable();
        matrices.dedup();
        assert_eq!(matrices.len(), 19);
        assert_eq!(origin(Matrix { n: 57344, k: 8192 }), "LLaMA-2-70B gate-up, LLaMA-3-70B gate-up");
        assert_eq!(origin(Matrix { n: 28672, k: 4096 }), "LLaMA-3-8B gate-up, Mistral-7B gate-up");
    }

    #[test]
    fn ablation_list_is_four_matrices_at_eleven_batch_sizes() {
        let cases = ablation_cases();
        let named: Vec<String> = cases.iter().map(|case| case.matrix.to_string()).collect();
        assert_eq!(named, ["22016x4096", "4096x11008", "57344x8192", "8192x28672"]);
        assert!(cases.iter().all(|case| case.tokens.len() == 11));
    }

    #[test]
    fn peer_list_is_the_first_page_and_the_cube() {
        let cases = peer_cases();
        assert_eq!(cases.len(), 10);
        assert_eq!(cases.iter().map(|case| case.tokens.len()).sum::<usize>(), 121);
        assert!(cases.iter().all(|case| case.tokens.is_sorted()));
    }

    #[test]
    fn shards_are_a_fourth_and_an_eighth_of_each_layer() {
        let cases = shard_cases();
        let named: Vec<String> = cases.iter().map(|case| case.matrix.to_string()).collect();
        let quarters = ["2560x8192", "8192x2048", "14336x8192", "8192x7168"];
        let eighths = ["1280x8192", "8192x1024", "7168x8192", "8192x3584"];
        assert_eq!(named, [quarters, eighths].concat());
        assert!(cases.iter().all(|case| case.tokens.len() == 21 && case.tokens.is_sorted()));
        assert!(cases.iter().all(|case| is_shard(case.matrix)) && !is_shard(Matrix { n: 8192, k: 8192 }));
        assert_eq!(origin(cases[5].matrix), "LLaMA-3-70B O on 8 GPUs");
    }

    #[test]
    fn between_list_has_no_power_of_two_and_dense_lists_go_in_steps_of_eight() {
        let between = between_cases();
        assert_eq!((between.len(), between[0].tokens.len()), (10, 26));
        assert!(between[0].tokens.iter().all(|m| !m.is_power_of_two()));
        assert_eq!(monotone_cases()[9].tokens.len(), 65 + 11);
        assert_eq!(curve_cases()[3].tokens[..3], [1, 8, 16]);
        for case in curve_cases() {
            assert!(peer_matrices().contains(&case.matrix));
        }
    }

    #[test]
    fn merged_lists_have_every_matrix_and_batch_size_once() {
        let list = |text: &str, tokens| custom_cases(&[text.parse().unwrap()], tokens);
        let cases = merged([list("64x64", &[8, 2]), list("64x128", &[1]), list("64x64", &[4, 2])]);
        assert_eq!(cases.len(), 2);
        assert_eq!(cases[0].tokens, [2, 4, 8]);
    }

    #[test]
    fn quick_list_has_twelve_points_and_covers_every_band() {
        let points: Vec<usize> = quick_cases().into_iter().flat_map(|case| case.tokens).collect();
        assert_eq!(points.len(), 12);
        for band in &crate::targets::BANDS {
            assert!(points.iter().any(|&m| band.contains(m)), "{band}");
        }
    }
}
