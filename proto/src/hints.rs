//! What a session may wish of the engine it computes on, in vAccel's bits of plugin types.

/// Computes on a processor.
pub const CPU: u32 = 0x1;
/// Computes on a graphics card.
pub const GPU: u32 = 0x2;
/// Computes on a field-programmable gate array.
pub const FPGA: u32 = 0x4;
/// Computes in software.
pub const SOFTWARE: u32 = 0x8;
/// Runs models of TensorFlow.
pub const TENSORFLOW: u32 = 0x10;
/// Runs models of Torch.
pub const TORCH: u32 = 0x20;
/// Computes on a Jetson board.
pub const JETSON: u32 = 0x40;
/// Serves operations that no other kind serves.
pub const GENERIC: u32 = 0x80;
/// Computes nothing, for tests.
pub const DEBUG: u32 = 0x100;
/// Computes elsewhere; to an agent this says nothing, as it is elsewhere.
pub const REMOTE: u32 = 0x4000;
/// Any of them: no wish at all.
pub const ALL: u32 = 0xffff;

/// All bits with their names.
pub const NAMES: [(u32, &str); 10] = [
    (CPU, "CPU"),
    (GPU, "GPU"),
    (FPGA, "FPGA"),
    (SOFTWARE, "SOFTWARE"),
    (TENSORFLOW, "TENSORFLOW"),
    (TORCH, "TORCH"),
    (JETSON, "JETSON"),
    (GENERIC, "GENERIC"),
    (DEBUG, "DEBUG"),
    (REMOTE, "REMOTE"),
];

/// What is left to wish for: 0 where any engine will do.
pub fn wish(hints: u32) -> u32 {
    if hints & ALL == ALL { 0 } else { hints & !REMOTE }
}

/// Bits as people write them, as in `CPU|DEBUG`. Those without a name are one number.
pub fn names(hints: u32) -> String {
    let known = NAMES.iter().filter(|(bit, _)| hints & bit != 0).map(|(_, name)| (*name).to_owned());
    let unknown = NAMES.iter().fold(hints, |rest, (bit, _)| rest & !bit);
    let unknown = (unknown != 0).then(|| format!("{unknown:#x}"));
    known.chain(unknown).collect::<Vec<_>>().join("|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_and_elsewhere_are_no_wishes() {
        assert_eq!([wish(0), wish(ALL), wish(REMOTE), wish(u32::MAX)], [0; 4]);
        assert_eq!(wish(REMOTE | GPU | DEBUG), GPU | DEBUG);
    }

    #[test]
    fn bits_have_names() {
        assert_eq!(names(CPU | DEBUG), "CPU|DEBUG");
        assert_eq!(names(GPU | 0x10_0000), "GPU|0x100000");
    }
}
