//! Tests of packed weights in files: saved weights load unchanged, and any other file is refused.
//!
//! They test `src/file.rs`, with files that are made or damaged through the `safetensors` crate.
#![cfg(feature = "files")]

use std::collections::HashMap;
use std::path::Path;

use liquidgemm::{Error, FileError, Group, PackedWeights};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

fn weights(n: usize, k: usize, group: Group) -> PackedWeights {
    let values: Vec<f32> = (0..n * k).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
    PackedWeights::quantize(&values, n, k, group).unwrap()
}

fn saved_bytes(weights: &PackedWeights) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    weights.save(&path).unwrap();
    std::fs::read(path).unwrap()
}

/// A file's contents, which a test can change and serialize again.
struct Contents {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Contents {
    fn of(bytes: &[u8]) -> Self {
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
        Self {
            metadata: header.metadata().clone().unwrap(),
            tensors: tensors
                .tensors()
                .into_iter()
                .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
                .collect(),
        }
    }

    fn with(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.to_owned(), value.to_owned());
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.metadata.remove(key);
        self
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }

    /// Sets a checksum that matches the contents. Computes it independently, from the format's description.
    fn resealed(mut self) -> Self {
        let mut text = String::new();
        for key in ["format", "format_version", "n", "k", "group"] {
            text += &format!("{}\n", self.metadata[key]);
        }
        let mut sealed = text.into_bytes();
        let names: &[&str] = match self.metadata["format_version"].as_str() {
            "1" => &["bricks", "channel_scales"],
            _ => &["codes", "pairs", "channel_scales"],
        };
        for name in names {
            sealed.extend(self.tensor(name).3.clone());
        }
        let checksum = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&sealed));
        self.with("checksum", &checksum)
    }

    /// Converts the file to format version 1, which stores each brick's pairs behind its codes.
    fn in_version_1(mut self) -> Self {
        let (_, _, shape, codes) = self.tensor("codes").clone();
        let (_, _, pairs_shape, pairs) = self.tensor("pairs").clone();
        let (strips, k_blocks, groups) = (shape[0], shape[1], pairs_shape[1]);
        let group_blocks = match self.metadata["group"].parse::<usize>() {
            Ok(group) => group / 64,
            Err(_) => k_blocks,
        };
        let mut bricks = Vec::new();
        for (strip, k_block) in
            (0..strips).flat_map(|strip| (0..k_blocks).map(move |k_block| (strip, k_block)))
        {
            bricks.extend_from_slice(&codes[(strip * k_blocks + k_block) * 2048..][..2048]);
            bricks.extend_from_slice(&pairs[(strip * groups + k_block / group_blocks) * 128..][..128]);
        }
        self.tensors.retain(|tensor| tensor.0 == "channel_scales");
        self.tensors.push(("bricks".to_owned(), Dtype::U8, vec![strips, k_blocks, 2176], bricks));
        self.with("format_version", "1").resealed()
    }

    fn bytes(self) -> Vec<u8> {
        let tensors = self.tensors.iter().map(|(name, dtype, shape, data)| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(tensors, Some(self.metadata)).unwrap()
    }

    fn load(self) -> Result<PackedWeights, FileError> {
        PackedWeights::from_file_bytes(&self.bytes())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_saved_weights_load_as_they_were(
        n in 1usize..200,
        k in 1usize..400,
        group in prop_oneof![Just(Group::K(64)), Just(Group::K(192)), Just(Group::Channel)],
    ) {
        let weights = weights(n, k, group);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.safetensors");
        weights.save(&path).unwrap();
        prop_assert_eq!(PackedWeights::load(&path).unwrap(), weights);
    }

    #[test]
    fn files_of_version_1_load_as_the_same_weights(
        n in 1usize..200,
        k in 1usize..400,
        group in prop_oneof![Just(Group::K(64)), Just(Group::K(192)), Just(Group::Channel)],
    ) {
        let weights = weights(n, k, group);
        let file = Contents::of(&saved_bytes(&weights)).in_version_1();
        prop_assert_eq!(file.load().unwrap(), weights);
    }

    #[test]
    fn arbitrary_bytes_are_an_error_and_never_a_panic(bytes: Vec<u8>) {
        prop_assert!(PackedWeights::from_file_bytes(&bytes).is_err());
    }
}

#[test]
fn the_checksum_is_the_one_that_the_format_describes() {
    let bytes = saved_bytes(&weights(3, 70, Group::Channel));
    let stored = Contents::of(&bytes).metadata["checksum"].clone();
    assert_eq!(Contents::of(&bytes).resealed().metadata["checksum"], stored);
}

#[test]
fn a_flip_of_any_single_bit_is_found() {
    let bytes = saved_bytes(&weights(2, 3, Group::default()));
    let mut damaged = bytes.clone();
    for bit in 0..8 * bytes.len() {
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(PackedWeights::from_file_bytes(&damaged).is_err(), "bit {} of byte {}", bit % 8, bit / 8);
        damaged[bit / 8] = bytes[bit / 8];
    }
    assert!(PackedWeights::from_file_bytes(&damaged).is_ok());
}

#[test]
fn a_file_truncated_anywhere_is_found() {
    let bytes = saved_bytes(&weights(2, 3, Group::default()));
    for length in 0..bytes.len() {
        assert!(matches!(PackedWeights::from_file_bytes(&bytes[..length]), Err(FileError::Safetensors(_))));
    }
}

#[test]
fn bytes_behind_the_end_are_found() {
    let mut bytes = saved_bytes(&weights(2, 3, Group::default()));
    bytes.push(0);
    assert!(matches!(PackedWeights::from_file_bytes(&bytes), Err(FileError::Safetensors(_))));
}

#[test]
fn a_damaged_code_is_a_checksum_error() {
    let mut contents = Contents::of(&saved_bytes(&weights(2, 3, Group::default())));
    contents.tensor("codes").3[5] ^= 1;
    assert!(matches!(contents.load(), Err(FileError::ChecksumMismatch { .. })));
}

#[test]
fn a_sealed_file_that_breaks_the_invariant_is_rejected_with_its_place_and_values() {
    let mut contents = Contents::of(&saved_bytes(&weights(70, 130, Group::default())));
    // Channel 65 is row 1 of the second strip.
    // In k block 2, its pair begins at byte 4 of the group's 128 bytes.
    let group = 3 + 2;
    contents.tensor("pairs").3[group * 128 + 4..][..2].copy_from_slice(&[9, 121]);
    match contents.resealed().load() {
        Err(FileError::Invalid(error)) => match *error {
            Error::InvariantBroken { channel: 65, k_block: 2, s: 9, a: 121 } => {}
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_scale_of_zero_in_a_pair_is_rejected() {
    let mut contents = Contents::of(&saved_bytes(&weights(1, 1, Group::default())));
    contents.tensor("pairs").3[0] = 0;
    let error = contents.resealed().load().unwrap_err();
    assert!(error.to_string().contains("s must be at least 1"), "{error}");
}

#[test]
fn a_channel_scale_that_is_not_finite_is_rejected() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut contents = Contents::of(&saved_bytes(&weights(3, 5, Group::default())));
        contents.tensor("channel_scales").3[4..8].copy_from_slice(&bad.to_le_bytes());
        match contents.resealed().load() {
            Err(FileError::Invalid(error)) => {
                assert!(matches!(*error, Error::NonFiniteParameter { index: 1, .. }), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn metadata_that_contradicts_the_tensors_is_rejected() {
    let bytes = saved_bytes(&weights(70, 130, Group::default()));
    let load = |key: &str, value: &str| Contents::of(&bytes).with(key, value).resealed().load();
    assert!(matches!(load("n", "69"), Err(FileError::WrongTensor { name: "channel_scales", .. })));
    assert!(matches!(load("n", "128"), Err(FileError::WrongTensor { name: "channel_scales", .. })));
    assert!(matches!(load("k", "128"), Err(FileError::WrongTensor { name: "codes", .. })));
    assert!(matches!(load("group", "128"), Err(FileError::WrongTensor { name: "pairs", .. })));
    assert!(matches!(load("group", "channel"), Err(FileError::WrongTensor { name: "pairs", .. })));
    // Version 1 repeats the pairs for each block of 64,
    // so pairs of groups of 64 contradict one group per channel.
    let file = Contents::of(&bytes).in_version_1().with("group", "channel").resealed();
    match file.load() {
        Err(FileError::Invalid(error)) => match *error {
            Error::PairsDiffer { channel: 0, k_block: 1, ref group } if group == "channel" => {}
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn invalid_metadata_is_rejected() {
    let bytes = saved_bytes(&weights(70, 130, Group::default()));
    let load = |key: &str, value: &str| Contents::of(&bytes).with(key, value).resealed().load();
    assert!(matches!(load("format", "other"), Err(FileError::WrongFormat { .. })));
    assert!(matches!(load("format_version", "3"), Err(FileError::WrongVersion { .. })));
    for (key, values) in [
        ("n", ["", "-1", "+70", "99999999999999999999999"]),
        ("k", ["0130", "x", "+130", "0x10"]),
        ("group", ["0", "65", "+64", "064"]),
    ] {
        for value in values {
            assert!(matches!(load(key, value), Err(FileError::BadMetadata { .. })), "{key} = {value:?}");
        }
    }
    for (key, value) in [("n", "0"), ("k", "0"), ("k", "131073"), ("n", "18446744073709551615")] {
        assert!(matches!(load(key, value), Err(FileError::Invalid(_))), "{key} = {value}");
    }
}

#[test]
fn missing_metadata_and_tensors_are_named() {
    let bytes = saved_bytes(&weights(2, 3, Group::default()));
    for key in ["format", "format_version", "n", "k", "group", "checksum"] {
        let error = Contents::of(&bytes).without(key).load().unwrap_err();
        assert!(error.to_string().contains(key) || key == "format_version", "{key}: {error}");
    }
    for name in ["codes", "pairs", "channel_scales"] {
        let mut contents = Contents::of(&bytes);
        contents.tensors.retain(|tensor| tensor.0 != name);
        let error = contents.load().unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn tensors_of_another_type_or_shape_are_rejected() {
    let bytes = saved_bytes(&weights(2, 3, Group::default()));
    let mut contents = Contents::of(&bytes);
    contents.tensor("channel_scales").1 = Dtype::I32;
    assert!(matches!(contents.load(), Err(FileError::WrongTensor { name: "channel_scales", .. })));
    let mut contents = Contents::of(&bytes);
    contents.tensor("codes").2 = vec![2048];
    assert!(matches!(contents.load(), Err(FileError::WrongTensor { name: "codes", .. })));
    let mut contents = Contents::of(&bytes).in_version_1();
    contents.tensor("bricks").2 = vec![2176];
    assert!(matches!(contents.load(), Err(FileError::WrongTensor { name: "bricks", .. })));
}

#[test]
fn any_other_safetensors_file_is_a_wrong_format_error() {
    let data = [0u8; 4];
    let view = TensorView::new(Dtype::F32, vec![1], &data).unwrap();
    let bytes = safetensors::serialize([("x", view)], None).unwrap();
    assert!(matches!(
        PackedWeights::from_file_bytes(&bytes),
        Err(FileError::WrongFormat { found: None, .. })
    ));
}

#[test]
fn saving_replaces_the_whole_file_and_leaves_no_other_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let (first, second) = (weights(100, 200, Group::default()), weights(2, 3, Group::Channel));
    first.save(&path).unwrap();
    second.save(&path).unwrap();
    assert_eq!(PackedWeights::load(&path).unwrap(), second);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_failed_save_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    // A directory has the file's name.
    let path = directory.path().join("taken");
    std::fs::create_dir(&path).unwrap();
    let error = weights(2, 3, Group::default()).save(&path).unwrap_err();
    assert!(
        matches!(error, Error::File { problem: FileError::NotAFile { found: "a directory" }, .. }),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn file_errors_name_the_file_and_the_action() {
    for path in ["no/such/directory/w.safetensors", "no-such-file.safetensors"] {
        let error = PackedWeights::load(path).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{path}: cannot open")), "{error}");
    }
    let error = weights(1, 1, Group::default()).save("no/such/directory/w.safetensors").unwrap_err();
    assert!(error.to_string().contains("no/such/directory/w.safetensors: cannot create"), "{error}");
}

#[test]
fn empty_files_and_directories_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, []).unwrap();
    for path in [empty.as_path(), directory.path(), Path::new("")] {
        assert!(matches!(PackedWeights::load(path), Err(Error::File { .. })), "{}", path.display());
    }
}

#[test]
fn the_same_weights_give_the_same_bytes() {
    let weights = weights(70, 130, Group::default());
    let bytes = saved_bytes(&weights);
    for _ in 0..10 {
        assert!(saved_bytes(&weights) == bytes);
    }
}

#[test]
fn unknown_tensors_and_repeated_keys_are_errors() {
    let bytes = saved_bytes(&weights(2, 3, Group::default()));
    let mut contents = Contents::of(&bytes);
    contents.tensors.push(("more".to_owned(), Dtype::U8, vec![1], vec![0]));
    assert!(matches!(contents.load(), Err(FileError::UnknownTensor { name }) if name == "more"));

    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..][..length]).unwrap().trim_end().to_owned();
    let doubled = |from: &str, to: &str| {
        let header = header.replacen(from, to, 1);
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(&bytes[8 + length..]);
        PackedWeights::from_file_bytes(&file)
    };
    assert!(doubled("", "").is_ok());
    for result in [doubled("\"k\":\"3\"", "\"k\":\"3\",\"k\":\"3\""), doubled("{", "{\"__metadata__\":{},")] {
        match result {
            Err(FileError::BadHeader { reason }) => assert!(reason.contains("twice"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_header_beyond_the_limit_is_refused_before_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    // A sparse file that is as long as its header claims.
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(90_000_008).unwrap();
    std::io::Write::write_all(&mut &file, &90_000_000u64.to_le_bytes()).unwrap();
    match PackedWeights::load(&path) {
        Err(Error::File { problem: FileError::HeaderTooLong { bytes: 90_000_000, .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        PackedWeights::from_file_bytes(&u64::MAX.to_le_bytes()),
        Err(FileError::HeaderTooLong { bytes: u64::MAX, .. })
    ));
}

/// A fuzz target: a file with changed bytes is an error,
/// or loads as weights that can be saved and loaded again.
///
/// By default it runs for some seconds.
/// `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000` makes it run for ten minutes.
#[test]
fn fuzz_damaged_files() {
    let shapes = [
        (1, 1, Group::default()),
        (3, 70, Group::default()),
        (65, 130, Group::K(128)),
        (2, 200, Group::Channel),
    ];
    let files = shapes.map(|(n, k, group)| saved_bytes(&weights(n, k, group)));
    let old = files.clone().map(|bytes| Contents::of(&bytes).in_version_1().bytes());
    let files = [files, old].concat();
    bolero::check!().with_type::<(u8, bool, Vec<(u16, u8, u8)>)>().cloned().for_each(
        |(which, is_in_the_header, changes)| {
            let mut bytes = files[which as usize % files.len()].clone();
            for (position, change, byte) in changes {
                // Most of a file is codes, whose changes only break the checksum.
                // So change the header's bytes often.
                let limit = if is_in_the_header { bytes.len().min(600) } else { bytes.len() };
                let at = position as usize % limit.max(1);
                match change % 6 {
                    0 if at < bytes.len() => bytes[at] = byte,
                    1 if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
                    2 => bytes.insert(at, byte),
                    3 if at < bytes.len() => drop(bytes.remove(at)),
                    4 => bytes.truncate(at),
                    // A digit, a quote or a bracket, as in the header.
                    _ if at < bytes.len() => bytes[at] = b"0123456789\"{}[],:"[byte as usize % 17],
                    _ => {}
                }
            }
            if let Ok(loaded) = PackedWeights::from_file_bytes(&bytes) {
                assert_eq!(PackedWeights::from_file_bytes(&saved_bytes(&loaded)).unwrap(), loaded);
            }
        },
    );
}

#[cfg(unix)]
mod unix {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn paths_that_are_no_regular_file_are_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let weights = weights(1, 1, Group::default());
        for path in [fifo.as_path(), Path::new("/dev/null"), directory.path()] {
            let before = fs::symlink_metadata(path).unwrap().ino();
            for outcome in [weights.save(path), PackedWeights::load(path).map(drop)] {
                match outcome {
                    Err(Error::File { problem: FileError::NotAFile { .. }, .. }) => {}
                    other => panic!("{}: {other:?}", path.display()),
                }
            }
            assert_eq!(fs::symlink_metadata(path).unwrap().ino(), before);
        }
        for outcome in [weights.save(""), PackedWeights::load("").map(drop)] {
            assert!(matches!(outcome, Err(Error::File { problem: FileError::EmptyPath, .. })), "{outcome:?}");
        }
    }

    #[test]
    fn links_are_followed_and_permissions_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("there")).unwrap();
        symlink("there/target", path("link")).unwrap();
        symlink("link", path("link to a link")).unwrap();
        let (old, new) = (weights(1, 1, Group::default()), weights(2, 2, Group::default()));
        // The link's target does not exist yet.
        old.save(path("link to a link")).unwrap();
        assert_eq!(PackedWeights::load(path("there/target")).unwrap(), old);
        fs::set_permissions(path("there/target"), Permissions::from_mode(0o600)).unwrap();
        new.save(path("link to a link")).unwrap();
        assert_eq!(PackedWeights::load(path("there/target")).unwrap(), new);
        assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
        assert_eq!(fs::metadata(path("there/target")).unwrap().mode() & 0o777, 0o600);

        symlink("circle", path("circle")).unwrap();
        assert!(new.save(path("circle")).is_err());
    }

    /// The environment variable with the path that the killed process saves to.
    const VICTIM: &str = "LIQUIDGEMM_TEST_SAVES_TO";

    fn old_and_new() -> [PackedWeights; 2] {
        [weights(300, 4000, Group::default()), weights(640, 2500, Group::Channel)]
    }

    #[test]
    #[ignore = "saves until it is killed, for the test below"]
    fn saves_until_it_is_killed() {
        let path = std::env::var_os(VICTIM).expect("started by the test below");
        let weights = old_and_new();
        for weights in weights.iter().cycle() {
            weights.save(&path).unwrap();
        }
    }

    #[test]
    fn a_process_killed_while_it_saves_leaves_the_old_file_or_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.safetensors");
        let weights = old_and_new();
        weights[0].save(&path).unwrap();
        for round in 0..20 {
            let mut victim = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "unix::saves_until_it_is_killed"])
                .env(VICTIM, &path)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            // Vary the time of the kill. The first save begins after about 20 ms,
            // and a save takes about 1 ms.
            std::thread::sleep(Duration::from_micros(15_000 + round * 4_321 % 60_000));
            victim.kill().unwrap();
            assert!(!victim.wait().unwrap().success(), "it ended by itself");
            let found = PackedWeights::load(&path).unwrap();
            assert!(weights.contains(&found), "round {round}");
        }
    }
}
