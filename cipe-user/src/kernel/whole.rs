//! Follows small kernel tables: each is read completely after a change.

use std::time::Duration;

use tokio::sync::watch;

use super::netlink::Result;

/// Pause between the first change and the reading, so that changes that come together cause one reading.
const SETTLE_DELAY: Duration = Duration::from_millis(10);

/// Pause before a table that could not be read is read again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A table of the kernel that is followed.
pub(super) trait KernelTable: Send + 'static {
    /// The contents of the table.
    type Content: Clone + PartialEq + Send + Sync + 'static;

    /// A name of the contents for the log.
    const NAME: &'static str;

    /// Waits for the next change; several changes may count as one. `None`: notifications have ended. Cancel safe.
    fn changed(&mut self) -> impl Future<Output = Option<()>> + Send;

    /// Reads the whole table.
    fn read(&mut self) -> impl Future<Output = Result<Self::Content>> + Send;
}

/// Follows a table from now on. The task ends when the receiver is dropped.
///
/// # Errors
/// The table cannot be read.
pub(super) async fn follow<T: KernelTable>(mut table: T) -> Result<watch::Receiver<T::Content>> {
    let (sender, receiver) = watch::channel(table.read().await?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = table.changed() => if changed.is_none() {
                    tracing::error!("netlink notifications ended: {} are not followed any longer", T::NAME);
                    return;
                },
                () = sender.closed() => return,
            }
            // Changes that come together cause one reading.
            tokio::time::sleep(SETTLE_DELAY).await;
            let content = loop {
                match table.read().await {
                    Ok(content) => break content,
                    Err(error) => tracing::warn!("{error}; read again in {} s", RETRY_INTERVAL.as_secs()),
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
                if sender.is_closed() {
                    return;
                }
            };
            sender.send_if_modified(|old| std::mem::replace(old, content.clone()) != content);
        }
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::kernel::netlink::Error;

    /// A table that returns these contents one after the other; `None` is a failed reading.
    struct Played {
        changes: mpsc::UnboundedReceiver<()>,
        contents: Vec<Option<u32>>,
    }

    impl KernelTable for Played {
        type Content = u32;
        const NAME: &'static str = "numbers";

        async fn changed(&mut self) -> Option<()> {
            self.changes.recv().await
        }

        async fn read(&mut self) -> Result<u32> {
            self.contents.pop().flatten().ok_or_else(|| Error::Answer("numbers".to_owned()))
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_change_is_read_until_it_can_be_and_the_end_is_told() {
        let (change, changes) = mpsc::unbounded_channel();
        let mut numbers = follow(Played { changes, contents: vec![Some(2), None, Some(1)] }).await.unwrap();
        assert_eq!(*numbers.borrow_and_update(), 1);
        change.send(()).unwrap();
        numbers.changed().await.unwrap();
        assert_eq!(*numbers.borrow_and_update(), 2);
        drop(change);
        assert!(numbers.changed().await.is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_table_that_cannot_be_read_at_the_start_is_an_error() {
        let (_change, changes) = mpsc::unbounded_channel();
        assert!(follow(Played { changes, contents: vec![] }).await.is_err());
    }
}
