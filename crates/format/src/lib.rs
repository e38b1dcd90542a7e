//! Packed weight layout, dequantization arithmetic and work schedule, shared by host and device.
