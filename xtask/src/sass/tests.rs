//! Tests of the SASS trace on short hand-written listings.

use super::*;

/// Returns a listing in nvdisasm's format. Lines that end in a colon are labels.
fn listing(lines: &[&str]) -> String {
    let mut address = 0;
    let lines = lines.iter().map(|line| {
        if line.ends_with(':') {
            return format!("{line}\n");
        }
        address += 16;
        format!("        /*{address:04x}*/                   {line} ;\n")
    });
    lines.collect()
}

fn traced(lines: &[&str]) -> anyhow::Result<Dequantization> {
    Kernel::parse(&listing(lines))?.dequantization(Form::MultiplyAddFlip, "IGMMA")
}

/// Unpacks nibbles to R4 to R7. `MULTIPLY` multiplies by R2 and adds R3, and `FLIPS` writes R8 to R11.
const UNPACK: [&str; 6] = [
    "LDS.64 R12, [R20]",
    "SHF.R.U32.HI R14, RZ, 0x4, R12",
    "LOP3.LUT R4, R12, 0xf0f0f0f, RZ, 0xc0, !PT",
    "LOP3.LUT R5, R13, 0xf0f0f0f, RZ, 0xc0, !PT",
    "LOP3.LUT R6, R14, 0xf0f0f0f, RZ, 0xc0, !PT",
    "LOP3.LUT R7, R14, 0xf0f0f0f, RZ, 0xc0, !PT",
];
const MULTIPLY: [&str; 4] =
    ["IMAD R4, R2.reuse, R4, R3.reuse", "IMAD R5, R5, R2, R3", "IMAD R6, R2, R6, R3", "IMAD R7, R2, R7, R3"];
const FLIPS: [&str; 4] = [
    "LOP3.LUT R8, R4, 0x80808080, RZ, 0x3c, !PT",
    "LOP3.LUT R9, R5, 0x80808080, RZ, 0x3c, !PT",
    "LOP3.LUT R10, R6, 0x80808080, RZ, 0x3c, !PT",
    "LOP3.LUT R11, R7, 0x80808080, RZ, 0x3c, !PT",
];
const MMA: &str = "IGMMA.64x8x32.S8.S8 R24, R8, gdesc[UR4], R24, gsb0";

/// Returns a loop that unpacks, multiplies, flips and issues the MMA, in this order.
fn straight() -> Vec<&'static str> {
    [&["MOV R1, R2", ".L_x_1:"][..], &UNPACK, &MULTIPLY, &FLIPS, &[MMA, "@P0 BRA `(.L_x_1)", "EXIT"]].concat()
}

const TWO_PER_WORD: Dequantization = Dequantization { multiplies: 1, words: 4, arithmetic: 8, unpacking: 6 };

#[test]
fn multiply_and_flip_are_two_instructions_a_word() {
    assert_eq!(traced(&straight()).unwrap(), TWO_PER_WORD);
}

#[test]
fn weights_of_warp_level_mma_are_traced() {
    let mut lines = straight();
    let place = lines.iter().position(|line| *line == MMA).unwrap();
    lines[place] = "IMMA.16832.S8.S8 R24, R8.ROW, R32.COL, R24";
    let kernel = Kernel::parse(&listing(&lines)).unwrap();
    assert_eq!(kernel.dequantization(Form::MultiplyAddFlip, "IMMA").unwrap(), TWO_PER_WORD);
    assert_eq!(kernel.dequantization(Form::MultiplyAddFlip, "IGMMA").unwrap().multiplies, 0);
}

#[test]
fn operands_of_the_next_iteration_are_traced_around_the_back_edge() {
    let pipelined = [
        &["CS2R R8, SRZ", "CS2R R10, SRZ", ".L_x_1:"][..],
        &[MMA, "@!P0 BRA `(.L_x_2)"],
        &UNPACK,
        &MULTIPLY,
        &FLIPS,
        &["BRA `(.L_x_1)", ".L_x_2:", "EXIT"],
    ]
    .concat();
    assert_eq!(traced(&pipelined).unwrap(), TWO_PER_WORD);
}

#[test]
fn a_wait_loop_inside_the_main_loop_does_not_end_the_trace() {
    let wait = [
        "BSSY B0, `(.L_x_4)",
        ".L_x_3:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R1+URZ], R0",
        "@!P1 BRA `(.L_x_3)",
        ".L_x_4:",
    ];
    let mut lines = straight();
    let place = lines.iter().position(|line| *line == MMA).unwrap();
    lines.splice(place..place, wait);
    assert_eq!(traced(&lines).unwrap(), TWO_PER_WORD);
}

#[test]
fn a_move_costs_one_instruction() {
    for (moved, then) in [
        ("IMAD.MOV.U32 R16, RZ, RZ, R4", [FLIPS[0], "LOP3.LUT R8, R16, 0x80808080, RZ, 0x3c, !PT"]),
        ("MOV R16, R4", [MULTIPLY[0], "IMAD R4, R2, R16, R3"]),
    ] {
        let mut lines = straight();
        let place = lines.iter().position(|line| *line == then[0]).unwrap();
        lines.splice(place..=place, [moved, then[1]]);
        assert_eq!(traced(&lines).unwrap(), Dequantization { arithmetic: 9, ..TWO_PER_WORD }, "{moved}");
    }
}

#[test]
fn constants_may_live_in_registers() {
    let mut lines = straight();
    lines.insert(0, "UMOV UR7, 0x80808080");
    lines.insert(0, "IMAD.MOV.U32 R40, RZ, RZ, 0xf0f0f0f");
    for line in &mut lines {
        *line = match *line {
            "LOP3.LUT R4, R12, 0xf0f0f0f, RZ, 0xc0, !PT" => "LOP3.LUT R4, R40, R12, RZ, 0xc0, !PT",
            "LOP3.LUT R8, R4, 0x80808080, RZ, 0x3c, !PT" => "LOP3.LUT R8, R4, UR7, RZ, 0x3c, !PT",
            other => other,
        };
    }
    assert_eq!(traced(&lines).unwrap(), TWO_PER_WORD);
}

#[test]
fn an_operand_in_another_form_is_an_error_that_shows_the_instruction() {
    for (good, bad) in [
        (FLIPS[2], "IADD3 R10, R6, 0x1, RZ"),
        (FLIPS[2], "LOP3.LUT R10, R6, 0x80808080, RZ, 0xfc, !PT"),
        (MULTIPLY[1], "IMAD.IADD R5, R5, 0x1, R3"),
        (UNPACK[3], "LOP3.LUT R5, R13, 0xff, RZ, 0xc0, !PT"),
        // A load overwrites a finished operand before the MMA.
        ("@P0 BRA `(.L_x_1)", "BRA `(.L_x_9)"),
    ] {
        let mut lines = straight();
        let place = lines.iter().position(|line| *line == good).unwrap();
        if bad.starts_with("BRA") {
            let mma = lines.iter().position(|line| *line == MMA).unwrap();
            lines.insert(mma, "LDS.128 R8, [R20]");
        } else {
            lines[place] = bad;
        }
        let error = format!("{:#}", traced(&lines).unwrap_err());
        assert!(error.contains("of `IGMMA") && error.contains("written by"), "{bad}: {error}");
    }
}

#[test]
fn a_predicated_writer_does_not_hide_the_one_before_it() {
    let mut lines = straight();
    let place = lines.iter().position(|line| *line == MMA).unwrap();
    lines.insert(place, "@P3 MOV R8, 0x1");
    assert!(traced(&lines).is_err());
}

#[test]
fn multiplies_outside_loops_and_from_shared_memory_have_no_words() {
    assert_eq!(traced(&[MMA, "EXIT"]).unwrap(), Dequantization::default());
    let shared =
        traced(&[".L_x_1:", "IGMMA.64x8x32.S8.S8 R24, gdesc[UR4], R24", "@P0 BRA `(.L_x_1)", "EXIT"]);
    assert_eq!(shared.unwrap(), Dequantization { multiplies: 1, ..Dequantization::default() });
}

#[test]
fn code_placed_out_of_line_makes_no_loop() {
    // The last block jumps backwards, but the code there never reaches that block again.
    let lines = ["@P0 BRA `(.L_x_2)", ".L_x_1:", MMA, "EXIT", ".L_x_2:", "MOV R8, R9", "BRA `(.L_x_1)"];
    assert_eq!(traced(&lines).unwrap(), Dequantization::default());
}

#[test]
fn instructions_are_found_by_their_opcode() {
    let kernel = Kernel::parse(&listing(&["STL.64 [R1], R2", "EXIT"])).unwrap();
    assert_eq!(kernel.find(&["LDL", "STL"]).as_deref(), Some("STL.64 [R1], R2 (at 0x0010)"));
    assert_eq!(kernel.find(&["IGMMA"]), None);
}

#[test]
fn destinations_are_distinguished_from_sources() {
    let writes = |line: &str, number: u32| {
        let instruction = Instruction::parse(&format!("/*0010*/ {line} ;")).unwrap();
        instruction.writes(Register { uniform: false, number })
    };
    assert!(writes("LDS.128 R12, [R16]", 15) && !writes("LDS.128 R12, [R16]", 16));
    assert!(writes("SHFL.IDX PT, R2, R3, RZ, 0x1f", 2) && !writes("SHFL.IDX PT, R2, R3, RZ, 0x1f", 3));
    assert!(writes("IMAD.WIDE.U32 R32, R37, 0x4, R34", 33));
    assert!(writes("IGMMA.64x256x32.S8.S8 R24, R160, gdesc[UR20], R24", 151));
    for line in [
        "ISETP.NE.U32.AND P0, PT, R5, RZ, PT",
        "STG.E desc[UR10][R6.64], R5",
        "BAR.SYNC R5, 0x80",
        "R2UR UR5, R5",
    ] {
        assert!(!writes(line, 5), "{line}");
    }
}

/// Multiplies R4 to R7 by R2, subtracts R3 byte by byte, and writes R8 to R11.
const SUBTRACT: [&str; 21] = [
    "LOP3.LUT R16, R3, 0x7f7f7f7f, RZ, 0xc0, !PT",
    "IMAD R4, R2.reuse, R4, RZ",
    "IMAD R5, R5, R2, RZ",
    "IMAD R6, R2, R6, RZ",
    "IMAD R7, R2, R7, RZ",
    "LOP3.LUT R8, R4, 0x80808080, RZ, 0xfc, !PT",
    "LOP3.LUT R9, R5, 0x80808080, RZ, 0xfc, !PT",
    "LOP3.LUT R10, R6, 0x80808080, RZ, 0xfc, !PT",
    "LOP3.LUT R11, R7, 0x80808080, RZ, 0xfc, !PT",
    "LOP3.LUT R4, R3, 0x80808080, R4, 0x84, !PT",
    "LOP3.LUT R5, R3, 0x80808080, R5, 0x84, !PT",
    "LOP3.LUT R6, R3, 0x80808080, R6, 0x84, !PT",
    "LOP3.LUT R7, R3, 0x80808080, R7, 0x84, !PT",
    "IMAD.IADD R8, R8, 0x1, -R16",
    "IADD3 R9, -R16, R9, RZ",
    "IMAD.IADD R10, R10, 0x1, -R16.reuse",
    "IMAD.IADD R11, R11, 0x1, -R16",
    "LOP3.LUT R8, R8, R4, RZ, 0x3c, !PT",
    "LOP3.LUT R9, R9, R5, RZ, 0x3c, !PT",
    "LOP3.LUT R10, R10, R6, RZ, 0x3c, !PT",
    "LOP3.LUT R11, R11, R7, RZ, 0x3c, !PT",
];

#[test]
fn byte_wise_subtraction_counts_what_depends_on_the_codes() {
    let lines = [&[".L_x_1:"][..], &UNPACK, &SUBTRACT, &[MMA, "@P0 BRA `(.L_x_1)", "EXIT"]].concat();
    let kernel = Kernel::parse(&listing(&lines)).unwrap();
    let cost = kernel.dequantization(Form::MultiplySubtract, "IGMMA").unwrap();
    assert_eq!(cost, Dequantization { arithmetic: 20, ..TWO_PER_WORD });
    assert!(kernel.dequantization(Form::MultiplyAddFlip, "IGMMA").is_err());
}

#[test]
fn weights_stored_to_shared_memory_are_traced_from_the_store() {
    let store = "STSM.16.M88.4 [R30], R8";
    let multiply = "IGMMA.64x8x32.S8.S8 R24, gdesc[UR4], R24, gsb0";
    let epilogue = "STSM.16.MT88.4 [R31], R24";
    let lines = [
        &[".L_x_1:"][..],
        &UNPACK,
        &MULTIPLY,
        &FLIPS,
        &[store, "@P0 BRA `(.L_x_1)", ".L_x_2:", multiply, epilogue, "@P1 BRA `(.L_x_2)", "EXIT"],
    ]
    .concat();
    assert_eq!(traced(&lines).unwrap(), TWO_PER_WORD);
}

#[test]
fn a_main_loop_compiled_for_divergent_lanes_is_found() {
    let found = |lines: &[&str]| Kernel::parse(&listing(lines)).unwrap().parted("IGMMA");
    assert_eq!(found(&straight()), None);
    for sign in ["SHFL.IDX PT, R20, R20, RZ, 0x1f", "BRA.DIV UR18, `(.L_x_1)"] {
        let mut lines = straight();
        lines.insert(2, sign);
        assert!(found(&lines).unwrap().contains(sign), "{sign}");
    }
    // A shuffle outside the loop does not matter.
    let mut lines = straight();
    lines.insert(0, "SHFL.IDX PT, R20, R20, RZ, 0x1f");
    assert_eq!(found(&lines), None);
}
