//! The figures of a GPU that the planner depends on: SMs, clusters, memory speed and clock.
//! They come from the driver's attributes, or for planning without a GPU from constants.

/// The number of SMs of a GPU, and the speed of its memory and its SMs.
///
/// [`Gpu::figures`](crate::gpu::Gpu::figures) returns those of an actual GPU.
/// The constants describe Hopper GPUs by name, for planning without one.
/// Unless stated otherwise, memory speeds and clocks are those that NVIDIA publishes:
/// in the data sheets of H100, H200 and GH200, and for the H100 PCIe in product brief PB-11133.
/// H20 and H800 have no public data sheet; their figures are those of server vendors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFigures {
    /// SMs. 0 counts as 1.
    pub multiprocessors: u32,
    /// Clusters of 1, 2, 4 and 8 thread blocks that run at a time, with one thread block per SM.
    ///
    /// A cluster lies within one GPC, whose number of SMs need not be a multiple of the cluster's size.
    /// An H100 SXM has 132, 66, 30 and 15.
    pub clusters: [u32; 4],
    /// Peak memory bandwidth in bytes per second. 0 counts as 1.
    pub memory_bytes_per_second: u64,
    /// The highest SM clock in Hz. 0 counts as 1.
    /// Under load the clock is lower, by about the same ratio on every GPU.
    pub clock_hz: u64,
}

/// Bytes of weights per cycle that the kernels request in the first turn of their rings on an H100 SXM.
/// They are 16 per SM.
/// This is slightly more than memory delivers at the SM clock under load, 1.7 to 1.8 GHz.
#[cfg(any(test, feature = "gpu"))]
const H100_FIRST_TURN_BYTES: u128 = 2112;

impl DeviceFigures {
    /// H100 SXM, 80 GB. The memory speed follows from the driver's attributes:
    /// 2,619 MHz, two transfers per cycle, 5,120 bits.
    pub const H100_SXM: Self = Self::of(132, 3_352_320_000_000, 1_980_000_000);
    /// H100 PCIe, 80 GB.
    pub const H100_PCIE: Self = Self::of(114, 2_000_000_000_000, 1_755_000_000);
    /// H200 SXM, 141 GB.
    pub const H200: Self = Self::of(132, 4_800_000_000_000, 1_980_000_000);
    /// GH200 with 96 GB of HBM3.
    pub const GH200: Self = Self::of(132, 4_000_000_000_000, 1_980_000_000);
    /// GH200 with 144 GB of HBM3e.
    pub const GH200_HBM3E: Self = Self::of(132, 4_900_000_000_000, 1_980_000_000);
    /// H20, 96 GB.
    pub const H20: Self = Self::of(78, 4_000_000_000_000, 1_980_000_000);
    /// H800 SXM, 80 GB. For work on a single GPU it equals an H100 SXM.
    pub const H800: Self = Self::H100_SXM;

    const fn of(multiprocessors: u32, memory_bytes_per_second: u64, clock_hz: u64) -> Self {
        let clusters = Self::cautious_clusters(multiprocessors);
        Self { multiprocessors, clusters, memory_bytes_per_second, clock_hz }
    }

    /// Estimates [`clusters`](Self::clusters) without the driver.
    ///
    /// One block per SM, and one cluster of two per two SMs, because SMs come in pairs (TPCs).
    /// Clusters of four and eight get the same fraction of the SMs as on an H100 SXM,
    /// where they leave 12 of 132 SMs idle.
    #[must_use]
    pub const fn cautious_clusters(multiprocessors: u32) -> [u32; 4] {
        let sms = multiprocessors as u64;
        [multiprocessors, multiprocessors / 2, (sms * 30 / 132) as u32, (sms * 15 / 132) as u32]
    }

    /// Returns the resident clusters of `cluster` blocks, or 0 if that is not 1, 2, 4 or 8.
    pub(crate) const fn resident_clusters(&self, cluster: u32) -> u32 {
        match cluster {
            1 => self.clusters[0],
            2 => self.clusters[1],
            4 => self.clusters[2],
            8 => self.clusters[3],
            _ => 0,
        }
    }

    /// Computes the figures from the driver's attributes:
    /// SM count, memory clock in kHz, memory bus width in bits, and SM clock in kHz.
    /// Memory makes two transfers per cycle.
    ///
    /// Some drivers and virtual GPUs report 0 for a clock or for the bus width.
    /// Each implausible value is replaced by that of an H100 SXM:
    /// a clock outside 100 MHz to 20 GHz, or a bus outside 64 to 65,536 bits.
    /// An SM count below 1 becomes 1.
    #[cfg(any(test, feature = "gpu"))]
    pub(crate) fn from_attributes(
        multiprocessors: i32,
        memory_clock_khz: i32,
        memory_bus_bits: i32,
        clock_khz: i32,
    ) -> Self {
        let positive = |value: i32| u64::try_from(value).unwrap_or(0);
        let plausible = |value: i32, least: u64, most: u64, otherwise: u64| {
            let value = positive(value);
            if (least..=most).contains(&value) { value } else { otherwise }
        };
        let (least_khz, most_khz) = (100_000, 20_000_000);
        let memory_khz = plausible(memory_clock_khz, least_khz, most_khz, 2_619_000);
        let bus_bits = plausible(memory_bus_bits, 64, 65_536, 5120);
        let clock_khz = plausible(clock_khz, least_khz, most_khz, Self::H100_SXM.clock_hz / 1000);
        let multiprocessors = multiprocessors.max(1) as u32;
        Self::of(multiprocessors, 2 * memory_khz * 1000 * bus_bits / 8, clock_khz * 1000)
    }

    /// Returns the memory speed as a multiple of an H100 SXM's.
    pub(crate) fn memory_speed(&self) -> f64 {
        self.memory_bytes_per_second.max(1) as f64 / Self::H100_SXM.memory_bytes_per_second as f64
    }

    /// Returns the duration of a cycle as a multiple of an H100 SXM's.
    pub(crate) fn cycle(&self) -> f64 {
        Self::H100_SXM.clock_hz as f64 / self.clock_hz.max(1) as f64
    }

    /// Returns the bytes of weights per cycle that all SMs together request in the first turn of their rings.
    ///
    /// On an H100 SXM they are [`H100_FIRST_TURN_BYTES`].
    /// On other GPUs they have the same ratio to the bytes that memory delivers per cycle.
    #[cfg(any(test, feature = "gpu"))]
    pub(crate) fn first_turn_bytes(&self) -> u32 {
        let of = |factor: u64| u128::from(factor.max(1));
        let reference = Self::H100_SXM;
        let bytes = H100_FIRST_TURN_BYTES * of(self.memory_bytes_per_second) * of(reference.clock_hz)
            / (of(self.clock_hz) * of(reference.memory_bytes_per_second));
        bytes.clamp(1, u128::from(u32::MAX)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_h100s_attributes_give_its_constant_and_the_measured_first_turn() {
        let figures = DeviceFigures::from_attributes(132, 2_619_000, 5120, 1_980_000);
        assert_eq!(figures, DeviceFigures::H100_SXM);
        assert_eq!((figures.memory_speed(), figures.cycle()), (1.0, 1.0));
        assert_eq!(figures.first_turn_bytes(), 2112);
    }

    #[test]
    fn implausible_attributes_are_replaced_one_by_one_by_an_h100s() {
        let reference = DeviceFigures::H100_SXM;
        for absurd in [0, -1, 1, 63, 99_999, 20_000_001, i32::MAX, i32::MIN] {
            let figures = DeviceFigures::from_attributes(78, absurd, 5120, 1_755_000);
            assert_eq!(figures, DeviceFigures::of(78, reference.memory_bytes_per_second, 1_755_000_000));
            let figures = DeviceFigures::from_attributes(132, 2_619_000, 6144, absurd);
            assert_eq!(
                (figures.clock_hz, figures.memory_bytes_per_second),
                (reference.clock_hz, 4_022_784_000_000)
            );
        }
        for absurd in [0, -1, 63, 65_537, i32::MAX, i32::MIN] {
            assert_eq!(DeviceFigures::from_attributes(132, 2_619_000, absurd, 1_980_000), reference);
        }
        for absurd in [0, -1, i32::MIN] {
            let figures = DeviceFigures::from_attributes(absurd, 2_619_000, 5120, 1_980_000);
            assert_eq!(figures, DeviceFigures::of(1, reference.memory_bytes_per_second, reference.clock_hz));
        }
    }

    #[test]
    fn faster_memory_gives_a_larger_first_turn_of_at_least_one_byte() {
        let bytes = |memory_bytes_per_second, clock_hz| {
            DeviceFigures { memory_bytes_per_second, clock_hz, ..DeviceFigures::H100_SXM }.first_turn_bytes()
        };
        assert_eq!(DeviceFigures::H200.first_turn_bytes(), 3024);
        assert!(bytes(4_000_000_000_000, 1_980_000_000) > bytes(3_000_000_000_000, 1_980_000_000));
        assert!(bytes(3_000_000_000_000, 1_500_000_000) > bytes(3_000_000_000_000, 1_980_000_000));
        assert_eq!((bytes(0, u64::MAX), bytes(u64::MAX, 0)), (1, u32::MAX));
    }
}
