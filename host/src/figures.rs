//! The figures of a GPU on which the choice of a plan depends.

/// How many SMs a GPU has, and how fast its memory and its SMs are.
///
/// [`Gpu::figures`](crate::gpu::Gpu::figures) are those of the GPU that runs; the constants are those of Hopper GPUs by name, for
/// planning without one. Their memory speeds and clocks are the ones that NVIDIA states for the product (data sheets of the H100, H200 and
/// GH200, product brief PB-11133 of the H100 PCIe; of the H20 and H800, which have no public data sheet, what vendors of servers state), as
/// far as nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFigures {
    /// SMs (multiprocessors); 0 is taken for 1.
    pub multiprocessors: u32,
    /// How many clusters of 1, 2, 4 and 8 thread blocks run at a time, with one block an SM. A cluster lies within one of the GPU's
    /// processing clusters (GPC), whose number of SMs it may not divide: 132, 66, 30 and 15 on an H100 SXM.
    pub clusters: [u32; 4],
    /// Peak speed of the GPU's memory, in bytes a second; 0 is taken for 1.
    pub memory_bytes_per_second: u64,
    /// The highest clock of the SMs, in Hz; 0 is taken for 1. Under load it is lower, by about the same share on every GPU.
    pub clock_hz: u64,
}

/// Bytes of weights a cycle that kernels ask for in the first turn of their rings on an H100 SXM: 16 for each SM. It is a little more than
/// memory delivers at the clock that the SMs have under load, 1.7 to 1.8 GHz.
const H100_FIRST_TURN_BYTES: u128 = 2112;

impl DeviceFigures {
    /// H100 SXM, 80 GB. The memory's speed is what the driver's attributes give: 2,619 MHz, two transfers a cycle, 5,120 bits.
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
    /// H800 SXM, 80 GB: to a single GPU's computations an H100 SXM.
    pub const H800: Self = Self::H100_SXM;

    const fn of(multiprocessors: u32, memory_bytes_per_second: u64, clock_hz: u64) -> Self {
        let clusters = Self::cautious_clusters(multiprocessors);
        Self { multiprocessors, clusters, memory_bytes_per_second, clock_hz }
    }

    /// [`clusters`](Self::clusters) where the driver hasn't been asked: one block an SM, one cluster of two for every two SMs, as SMs come
    /// in pairs (TPCs), and of clusters of four and eight the same share of the SMs as on an H100 SXM, which leaves 12 of its 132 idle.
    #[must_use]
    pub const fn cautious_clusters(multiprocessors: u32) -> [u32; 4] {
        let sms = multiprocessors as u64;
        [multiprocessors, multiprocessors / 2, (sms * 30 / 132) as u32, (sms * 15 / 132) as u32]
    }

    /// Clusters of so many blocks that run at a time; none of a size that isn't 1, 2, 4 or 8.
    pub(crate) const fn resident_clusters(&self, cluster: u32) -> u32 {
        match cluster {
            1 => self.clusters[0],
            2 => self.clusters[1],
            4 => self.clusters[2],
            8 => self.clusters[3],
            _ => 0,
        }
    }

    /// From what the driver's attributes say: multiprocessors, memory clock in kHz, width of the memory bus in bits, and SM clock in kHz.
    /// Memory makes two transfers a cycle.
    ///
    /// Some drivers and virtual GPUs report 0 for clock or bus. A memory or SM clock that isn't between 100 MHz and 20 GHz, and a bus that
    /// isn't between 64 and 65,536 bits wide, are taken for an H100 SXM's, each on its own; fewer multiprocessors than one for one.
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

    /// Memory's speed as a multiple of an H100 SXM's.
    pub(crate) fn memory_speed(&self) -> f64 {
        self.memory_bytes_per_second.max(1) as f64 / Self::H100_SXM.memory_bytes_per_second as f64
    }

    /// How much longer than on an H100 SXM a number of cycles takes.
    pub(crate) fn cycle(&self) -> f64 {
        Self::H100_SXM.clock_hz as f64 / self.clock_hz.max(1) as f64
    }

    /// Bytes of weights a cycle that all SMs together ask for in the first turn of their rings: as [`H100_FIRST_TURN_BYTES`] to what memory
    /// delivers in a cycle.
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
    fn an_h100s_attributes_are_its_constant_and_its_pace_is_the_measured_one() {
        let figures = DeviceFigures::from_attributes(132, 2_619_000, 5120, 1_980_000);
        assert_eq!(figures, DeviceFigures::H100_SXM);
        assert_eq!((figures.memory_speed(), figures.cycle()), (1.0, 1.0));
        assert_eq!(figures.first_turn_bytes(), 2112);
    }

    #[test]
    fn attributes_that_cannot_be_are_an_h100s_one_by_one() {
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
    fn the_first_turn_asks_for_more_where_memory_is_faster_and_always_for_something() {
        let bytes = |memory_bytes_per_second, clock_hz| {
            DeviceFigures { memory_bytes_per_second, clock_hz, ..DeviceFigures::H100_SXM }.first_turn_bytes()
        };
        assert_eq!(DeviceFigures::H200.first_turn_bytes(), 3024);
        assert!(bytes(4_000_000_000_000, 1_980_000_000) > bytes(3_000_000_000_000, 1_980_000_000));
        assert!(bytes(3_000_000_000_000, 1_500_000_000) > bytes(3_000_000_000_000, 1_980_000_000));
        assert_eq!((bytes(0, u64::MAX), bytes(u64::MAX, 0)), (1, u32::MAX));
    }
}
