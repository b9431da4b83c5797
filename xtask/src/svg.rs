//! The parts of SVG that plots and flame graphs need.

use std::fmt::Write;

/// A picture to which shapes are added.
pub(crate) struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    /// A white picture of this size in pixels.
    pub(crate) fn new(width: f64, height: f64) -> Self {
        let mut svg = Self { body: String::new(), width, height };
        svg.rect((0.0, 0.0), (width, height), "rx=\"6\" fill=\"#fff\"");
        svg
    }

    /// A line of text that begins at `at` (its baseline), or ends or is centred there by `text-anchor` in `style`.
    pub(crate) fn text(&mut self, at: (f64, f64), style: &str, content: &str) {
        self.put(format_args!("<text x=\"{:.1}\" y=\"{:.1}\" {style}>{}</text>", at.0, at.1, escape(content)));
    }

    /// A rectangle from its upper left corner.
    pub(crate) fn rect(&mut self, at: (f64, f64), size: (f64, f64), style: &str) {
        let ((x, y), (width, height)) = (at, size);
        self.put(format_args!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" {style}/>"));
    }

    /// A straight line.
    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        self.put(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// Shapes that show `hint` when pointed at.
    pub(crate) fn hinted(&mut self, hint: &str, draw: impl FnOnce(&mut Self)) {
        self.put(format_args!("<g><title>{}</title>", escape(hint)));
        draw(self);
        self.put(format_args!("</g>"));
    }

    /// The whole picture.
    pub(crate) fn finish(self) -> String {
        let Self { body, width, height } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\" \
             font-size=\"12\">\n{body}</svg>\n"
        )
    }

    fn put(&mut self, shape: std::fmt::Arguments<'_>) {
        // Writing into a String cannot fail.
        let _ = writeln!(self.body, "{shape}");
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_markup_is_text() {
        let mut svg = Svg::new(10.0, 10.0);
        svg.hinted("Vec<u8> & co", |svg| svg.text((1.0, 2.0), "", "<unknown>"));
        let picture = svg.finish();
        assert!(picture.contains("<title>Vec&lt;u8&gt; &amp; co</title>"), "{picture}");
        assert!(picture.contains(">&lt;unknown&gt;</text>"), "{picture}");
    }
}
