//! How long a certificate still holds.

use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A chain of a dozen certificates is some 20 KB.
pub const BYTES_MAX: usize = 64 * 1024;

/// The end of the first certificate of a PEM chain, in Unix time.
pub fn end_of_pem(bytes: &[u8]) -> Option<i64> {
    let first = Pem::iter_from_buffer(bytes).flatten().find(|pem| pem.label == "CERTIFICATE")?;
    end_of_der(&first.contents)
}

/// The end of a certificate in DER, in Unix time.
pub fn end_of_der(bytes: &[u8]) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(bytes).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// Whole days from `now` on, both in Unix time; negative once it has ended.
pub fn days(end: i64, now: i64) -> i64 {
    end.saturating_sub(now).div_euclid(86_400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_whole_and_the_last_one_is_0() {
        assert_eq!(days(90 * 86_400 + 5, 0), 90);
        assert_eq!((days(86_399, 0), days(0, 0), days(-1, 0)), (0, 0, -1));
        assert_eq!(days(i64::MIN, i64::MAX), i64::MIN.div_euclid(86_400));
    }

    #[test]
    fn what_is_no_certificate_has_no_end() {
        let torn = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for text in ["", "hello", torn, key, "-----BEGIN CERTIFICATE-----\n"] {
            assert_eq!(end_of_pem(text.as_bytes()), None, "{text}");
        }
        assert_eq!(end_of_der(&[0x30; 300]), None);
    }
}
