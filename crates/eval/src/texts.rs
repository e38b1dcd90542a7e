//! The texts that ship with the crate: for evaluation, and others for calibration.
//!
//! `assets/README.md` says where they come from.

use std::io::Read;

use flate2::read::GzDecoder;

use crate::model::Network;

/// 200 sentences, one a line, on which encoders are evaluated.
const SENTENCES: &str = include_str!("../assets/sentences.txt");
/// Other sentences, with which encoders are calibrated.
const CALIBRATION_SENTENCES: &str = include_str!("../assets/calibration-sentences.txt");
/// The opening chapters of *Persuasion*, on which language models are evaluated.
const BOOK: &[u8] = include_bytes!("../assets/persuasion.txt.gz");
/// The opening chapters of *Sense and Sensibility*, with which language models are calibrated.
const CALIBRATION_BOOK: &[u8] = include_bytes!("../assets/sense-and-sensibility.txt.gz");

/// Returns the text on which such a model is evaluated.
pub fn evaluation(network: &Network) -> String {
    match network {
        Network::Encoder(_) => SENTENCES.into(),
        Network::Causal(_) => unpack(BOOK),
    }
}

/// Returns the text with which such a model is calibrated. It shares no sentence with [`evaluation`].
pub fn calibration(network: &Network) -> String {
    match network {
        Network::Encoder(_) => CALIBRATION_SENTENCES.into(),
        Network::Causal(_) => unpack(CALIBRATION_BOOK),
    }
}

/// A text's name for reports.
pub struct Name {
    sentences: &'static str,
    book: &'static str,
}

/// The names of the texts of [`evaluation`].
pub const EVALUATION_NAME: Name = Name { sentences: "200 sentences", book: "Persuasion (J. Austen)" };
/// The names of the texts of [`calibration`].
pub const CALIBRATION_NAME: Name =
    Name { sentences: "128 other sentences", book: "Sense and Sensibility (J. Austen)" };

impl Name {
    /// Returns the name of the text for such a model.
    pub fn of(&self, network: &Network) -> &'static str {
        match network {
            Network::Encoder(_) => self.sentences,
            Network::Causal(_) => self.book,
        }
    }
}

fn unpack(bytes: &[u8]) -> String {
    let mut text = String::new();
    GzDecoder::new(bytes).read_to_string(&mut text).expect("the asset is valid");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn there_are_200_different_sentences_and_none_of_them_calibrates() {
        let sentences: HashSet<&str> = SENTENCES.lines().collect();
        assert_eq!((sentences.len(), SENTENCES.lines().count()), (200, 200));
        let calibration: HashSet<&str> = CALIBRATION_SENTENCES.lines().collect();
        assert_eq!(calibration.len(), CALIBRATION_SENTENCES.lines().count());
        assert!(sentences.is_disjoint(&calibration));
    }

    #[test]
    fn books_are_different_and_long_enough() {
        let [book, calibration] = [BOOK, CALIBRATION_BOOK].map(unpack);
        assert!(book.split_whitespace().count() > 18_000 && calibration.split_whitespace().count() > 18_000);
        let paragraphs: HashSet<&str> = book.split("\n\n").collect();
        assert!(calibration.split("\n\n").all(|paragraph| !paragraphs.contains(paragraph)));
    }
}
