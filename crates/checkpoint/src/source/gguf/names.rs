//! Names of llama.cpp's tensors and the Hugging Face names that they stand for.

use super::container::Container;
use crate::error::Problem;

/// The model families whose tensors can be renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// LLaMA and Mistral. Query and key weights are permuted.
    Llama,
    /// Mixtral: experts in place of the feed-forward. Query and key weights are permuted.
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen2Moe,
    Qwen3Moe,
}

impl Family {
    pub(crate) fn of(container: &Container) -> Result<Self, Problem> {
        let architecture = container.metadata.get("general.architecture").and_then(|value| value.as_text());
        Ok(match architecture {
            Some("llama") if container.tensors.iter().any(|tensor| tensor.name.contains("ffn_gate_inp")) => {
                Family::Mixtral
            }
            Some("llama") => Family::Llama,
            Some("qwen2") => Family::Qwen2,
            Some("qwen3") => Family::Qwen3,
            Some("qwen2moe") => Family::Qwen2Moe,
            Some("qwen3moe") => Family::Qwen3Moe,
            other => {
                return Err(Problem::Unsupported {
                    what: format!("a GGUF file of the architecture {:?}", other.unwrap_or("(none)")),
                    remedy: "llama, qwen2, qwen3, qwen2moe and qwen3moe can be read; take the original checkpoint",
                });
            }
        })
    }

    /// Returns the prefix of the family's metadata.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Family::Llama | Family::Mixtral => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen2Moe => "qwen2moe",
            Family::Qwen3Moe => "qwen3moe",
        }
    }

    /// Returns whether llama.cpp interleaves the two halves of each query and key head.
    pub(crate) fn permutes(self) -> bool {
        matches!(self, Family::Llama | Family::Mixtral)
    }
}

/// What a tensor becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A tensor of this name.
    Same(String),
    /// A query tensor of this name, whose rows may be permuted.
    Query(String),
    /// A key tensor of this name, whose rows may be permuted.
    Key(String),
    /// One tensor an expert: the name before and after the expert's number.
    Experts(String, &'static str),
    /// The tensor with one row more in its shape: `[k]` becomes `[1, k]`.
    Row(String),
    /// Nothing: the configuration has what it says.
    InConfig,
}

/// Returns what the tensor `name` becomes, or `None` for a name that the family does not have.
pub(crate) fn target(family: Family, name: &str) -> Option<Target> {
    let top = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        "rope_freqs.weight" => return Some(Target::InConfig),
        _ => "",
    };
    if !top.is_empty() {
        return Some(Target::Same(top.to_owned()));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok().filter(|number: &u32| number.to_string() == layer)?;
    let (module, kind) = rest.rsplit_once('.')?;
    let kind = match kind {
        "weight" => ".weight",
        "bias" => ".bias",
        _ => return None,
    };
    let layer = format!("model.layers.{layer}");
    let same = |module: &str| Some(Target::Same(format!("{layer}.{module}{kind}")));
    let (moe, [gate, up, down]) = match family {
        Family::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
        _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
    };
    let experts = |projection: &'static str| {
        let suffix = match (projection, kind) {
            ("w1", ".weight") => ".w1.weight",
            ("w2", ".weight") => ".w2.weight",
            ("w3", ".weight") => ".w3.weight",
            ("gate_proj", ".weight") => ".gate_proj.weight",
            ("up_proj", ".weight") => ".up_proj.weight",
            ("down_proj", ".weight") => ".down_proj.weight",
            _ => return None,
        };
        Some(Target::Experts(format!("{layer}.{moe}.experts."), suffix))
    };
    match module {
        "attn_norm" => same("input_layernorm"),
        "ffn_norm" => same("post_attention_layernorm"),
        "attn_q" => Some(Target::Query(format!("{layer}.self_attn.q_proj{kind}"))),
        "attn_k" => Some(Target::Key(format!("{layer}.self_attn.k_proj{kind}"))),
        "attn_v" => same("self_attn.v_proj"),
        "attn_output" => same("self_attn.o_proj"),
        "attn_q_norm" => same("self_attn.q_norm"),
        "attn_k_norm" => same("self_attn.k_norm"),
        "ffn_gate" => same("mlp.gate_proj"),
        "ffn_up" => same("mlp.up_proj"),
        "ffn_down" => same("mlp.down_proj"),
        "ffn_gate_inp" => same(&format!("{moe}.gate")),
        "ffn_gate_inp_shexp" => Some(Target::Row(format!("{layer}.mlp.shared_expert_gate{kind}"))),
        "ffn_gate_shexp" => same("mlp.shared_expert.gate_proj"),
        "ffn_up_shexp" => same("mlp.shared_expert.up_proj"),
        "ffn_down_shexp" => same("mlp.shared_expert.down_proj"),
        "ffn_gate_exps" => experts(gate),
        "ffn_up_exps" => experts(up),
        "ffn_down_exps" => experts(down),
        _ => None,
    }
}

/// Returns the row of llama.cpp's query or key tensor that is row `row` of the Hugging Face one.
///
/// llama.cpp reshapes the rows of each head from `[2, head/2]` to `[head/2, 2]`.
pub(crate) fn permuted_row(row: usize, head: usize) -> usize {
    let (start, within) = (row / head * head, row % head);
    let (half, pair) = (within / (head / 2), within % (head / 2));
    start + pair * 2 + half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_those_of_hugging_face() {
        let name = |family, name| target(family, name).unwrap();
        let same = |name: &str| Target::Same(name.to_owned());
        assert_eq!(
            name(Family::Llama, "blk.12.ffn_down.weight"),
            same("model.layers.12.mlp.down_proj.weight")
        );
        assert_eq!(name(Family::Qwen2, "blk.0.attn_v.bias"), same("model.layers.0.self_attn.v_proj.bias"));
        assert_eq!(
            name(Family::Llama, "blk.3.attn_q.weight"),
            Target::Query("model.layers.3.self_attn.q_proj.weight".into())
        );
        assert_eq!(
            name(Family::Mixtral, "blk.1.ffn_up_exps.weight"),
            Target::Experts("model.layers.1.block_sparse_moe.experts.".into(), ".w3.weight")
        );
        assert_eq!(
            name(Family::Qwen3Moe, "blk.1.ffn_gate_inp.weight"),
            same("model.layers.1.mlp.gate.weight")
        );
        for unknown in ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.attn_q", "blk.0.foo.weight", ""]
        {
            assert_eq!(target(Family::Llama, unknown), None, "{unknown}");
        }
    }

    #[test]
    fn permuted_rows_undo_llama_cpps_reshape() {
        // llama.cpp: rows.reshape(heads, 2, head/2).swapaxes(1, 2).
        let (heads, head) = (3, 8);
        let mut stored = Vec::new();
        for h in 0..heads {
            for pair in 0..head / 2 {
                for half in 0..2 {
                    stored.push(h * head + half * head / 2 + pair);
                }
            }
        }
        let restored: Vec<usize> = (0..heads * head).map(|row| stored[permuted_row(row, head)]).collect();
        assert_eq!(restored, (0..heads * head).collect::<Vec<_>>());
    }
}
