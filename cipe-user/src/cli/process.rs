//! The name of this process.

use std::ffi::CString;

/// Sets the name that `pgrep -x` and `ps` show. In the background, the name would be that of the link's target, `cipe`.
pub(super) fn set_name(name: &str) {
    let outcome = CString::new(name).map(|name| rustix::thread::set_name(&name));
    if !matches!(outcome, Ok(Ok(()))) {
        tracing::debug!("the process keeps its name: {outcome:?}");
    }
}
