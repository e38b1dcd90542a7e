//! Tests on tiny random models that they write themselves: two blocks, 64 channels, a few dozen tokens.
//! One program, because every test program links all of candle and the tokenizers.

mod fixture;
mod forward;
mod moments;
mod plain;
mod quantized;
mod refused;
mod transformed;
