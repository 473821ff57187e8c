//! What every object file has besides its programs.

/// MIT, as the whole project; the kernel knows it by this name among the licences that it
/// lends its routing table to.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing in the programs panics; the verifier would refuse this loop if it could
    // be reached.
    loop {}
}
